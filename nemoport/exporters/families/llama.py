"""Llama 2, 3 and 3.x, and what differs from them by a flag: Mistral (sliding window), Qwen2 (bias on q, k, v), Qwen3
(norm on q and k).

RMSNorm before attention and feed-forward, rotary positions, grouped-query attention, gated SiLU.
"""

from __future__ import annotations

from typing import Any

from nemoport.errors import UnsupportedInput
from nemoport.exporters.configs import Config, Dialect, Key, Keys, Mark, whole_number
from nemoport.exporters.layouts import PADDED, QUERY_GROUPS, STACKED
from nemoport.exporters.rules import Column, Rule
from nemoport.spec import LinearScaling, Llama3Scaling

_L = "layers.{i}."
_QKV_WEIGHTS = (f"{_L}attn.q.weight", f"{_L}attn.k.weight", f"{_L}attn.v.weight")
_QKV_BIASES = (f"{_L}attn.q.bias", f"{_L}attn.k.bias", f"{_L}attn.v.bias")


def _decoder_layer(prefix: str, *rules: tuple[str, str]) -> tuple[Rule, ...]:
    """Rules that only rename: (stored, canonical) below one layer."""
    return tuple(Rule(prefix + stored, (_L + canonical,)) for stored, canonical in rules)


_M = "decoder.layers.{i}."
MEGATRON_RULES = (
    Rule("embedding.word_embeddings.weight", ("embed.weight",), PADDED),
    Rule("decoder.final_layernorm.weight", ("norm.weight",)),
    Rule("output_layer.weight", ("head.weight",), PADDED),
    Rule(f"{_M}self_attention.linear_qkv.weight", _QKV_WEIGHTS, QUERY_GROUPS),
    Rule(f"{_M}self_attention.linear_qkv.bias", _QKV_BIASES, QUERY_GROUPS),
    Rule(f"{_M}mlp.linear_fc1.weight", (f"{_L}ffn.gate.weight", f"{_L}ffn.up.weight"), STACKED),
    Rule(f"{_M}mlp.linear_fc1.bias", (f"{_L}ffn.gate.bias", f"{_L}ffn.up.bias"), STACKED),
    *_decoder_layer(
        _M,
        ("self_attention.linear_qkv.layer_norm_weight", "attn_norm.weight"),
        ("input_layernorm.weight", "attn_norm.weight"),
        ("self_attention.q_layernorm.weight", "attn.q_norm.weight"),
        ("self_attention.k_layernorm.weight", "attn.k_norm.weight"),
        ("self_attention.linear_proj.weight", "attn.o.weight"),
        ("self_attention.linear_proj.bias", "attn.o.bias"),
        ("mlp.linear_fc1.layer_norm_weight", "ffn_norm.weight"),
        ("pre_mlp_layernorm.weight", "ffn_norm.weight"),
        ("mlp.linear_fc2.weight", "ffn.down.weight"),
        ("mlp.linear_fc2.bias", "ffn.down.bias"),
    ),
)
_H = "model.layers.{i}."
HUGGINGFACE_RULES = (
    Rule("model.embed_tokens.weight", ("embed.weight",), PADDED),
    *_decoder_layer(
        _H,
        ("input_layernorm.weight", "attn_norm.weight"),
        ("self_attn.q_proj.weight", "attn.q.weight"),
        ("self_attn.k_proj.weight", "attn.k.weight"),
        ("self_attn.v_proj.weight", "attn.v.weight"),
        ("self_attn.o_proj.weight", "attn.o.weight"),
        ("self_attn.q_proj.bias", "attn.q.bias"),
        ("self_attn.k_proj.bias", "attn.k.bias"),
        ("self_attn.v_proj.bias", "attn.v.bias"),
        ("self_attn.o_proj.bias", "attn.o.bias"),
        ("self_attn.q_norm.weight", "attn.q_norm.weight"),
        ("self_attn.k_norm.weight", "attn.k_norm.weight"),
        ("post_attention_layernorm.weight", "ffn_norm.weight"),
        ("mlp.gate_proj.weight", "ffn.gate.weight"),
        ("mlp.up_proj.weight", "ffn.up.weight"),
        ("mlp.down_proj.weight", "ffn.down.weight"),
        ("mlp.gate_proj.bias", "ffn.gate.bias"),
        ("mlp.up_proj.bias", "ffn.up.bias"),
        ("mlp.down_proj.bias", "ffn.down.bias"),
    ),
    Rule("model.norm.weight", ("norm.weight",)),
    Rule("lm_head.weight", ("head.weight",), PADDED),
)
_T = "transformer.layers.{i}."
TRTLLM_RULES = (
    Rule("transformer.vocab_embedding.weight", ("embed.weight",)),
    *_decoder_layer(_T, ("input_layernorm.weight", "attn_norm.weight")),
    Rule(f"{_T}attention.qkv.weight", _QKV_WEIGHTS, STACKED),
    Rule(f"{_T}attention.qkv.bias", _QKV_BIASES, STACKED),
    *_decoder_layer(
        _T,
        ("attention.dense.weight", "attn.o.weight"),
        ("attention.dense.bias", "attn.o.bias"),
        ("post_layernorm.weight", "ffn_norm.weight"),
        ("mlp.fc.weight", "ffn.gate.weight"),  # fc is the gate and gate is the up-projection there
        ("mlp.fc.bias", "ffn.gate.bias"),
        ("mlp.gate.weight", "ffn.up.weight"),
        ("mlp.gate.bias", "ffn.up.bias"),
        ("mlp.proj.weight", "ffn.down.weight"),
        ("mlp.proj.bias", "ffn.down.bias"),
    ),
    Rule("transformer.ln_f.weight", ("norm.weight",)),
    Rule("lm_head.weight", ("head.weight",)),
)


def _megatron_scaling(config: Config) -> LinearScaling | Llama3Scaling | None:
    """Three ways to say it: NeMo's Llama31Config, Megatron-core's `rope_scaling`, and interpolation."""
    if config.get("scale_factor") is not None and config.get("old_context_len") is not None:
        return Llama3Scaling(
            factor=float(config["scale_factor"]),
            low_freq_factor=float(config.get("low_freq_factor") or 1.0),
            high_freq_factor=float(config.get("high_freq_factor") or 4.0),
            original_max_positions=int(config["old_context_len"]),
        )
    if config.get("rope_scaling"):
        return Llama3Scaling(factor=float(config.get("rope_scaling_factor") or 8.0))
    if factor := config.get("seq_len_interpolation_factor"):
        return LinearScaling(factor=float(factor))
    return None


def _to_megatron_scaling(scaling: LinearScaling | Llama3Scaling | None) -> dict[str, Any]:
    match scaling:
        case Llama3Scaling():
            return {
                "scale_factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "old_context_len": scaling.original_max_positions,
            }
        case LinearScaling():
            return {"seq_len_interpolation_factor": scaling.factor}
    return {}


def _huggingface_rope(config: Config) -> Config:
    """transformers 5 gathers in `rope_parameters` what 4 had in `rope_theta` and `rope_scaling`."""
    return config.get("rope_parameters") or {
        "rope_theta": config.get("rope_theta"),
        **(config.get("rope_scaling") or {}),
    }


def _huggingface_scaling(config: Config) -> LinearScaling | Llama3Scaling | None:
    return _scaling(_huggingface_rope(config))


def _scaling(rope: Config) -> LinearScaling | Llama3Scaling | None:
    match kind := rope.get("rope_type") or rope.get("type") or "default":
        case "default":
            return None
        case "linear":
            return LinearScaling(factor=float(rope["factor"]))
        case "llama3":
            return Llama3Scaling(
                factor=float(rope["factor"]),
                low_freq_factor=float(rope["low_freq_factor"]),
                high_freq_factor=float(rope["high_freq_factor"]),
                original_max_positions=int(rope["original_max_position_embeddings"]),
            )
    raise UnsupportedInput(f"the config scales rope by {kind!r}; nemoport knows default, linear and llama3")


def _to_scaling(scaling: LinearScaling | Llama3Scaling | None) -> dict[str, Any] | None:
    match scaling:
        case Llama3Scaling():
            return {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_positions,
            }
        case LinearScaling():
            return {"rope_type": "linear", "factor": scaling.factor}
    return None


def _window(value: Any) -> int:
    """Megatron-core's (left, right): `left` positions before the current one, none after."""
    left, right = (value, 0) if isinstance(value, int) else value
    if right:
        raise ValueError(value)
    return whole_number(left) + 1


_SHAPE = {"norm": "rms", "activation": "silu", "gated": True, "rope_fraction": 1.0}
_PLAIN = {"window": None, "qkv_bias": False, "out_bias": False, "qk_norm": False, "ffn_bias": False}

MEGATRON = Dialect(
    marks=(
        Mark("normalization", "RMSNorm", absent="LayerNorm"),
        Mark("gated_linear_unit", True, absent=False),
        Mark("activation_func", "silu", absent="gelu"),
        Mark("position_embedding_type", "rope", absent="learned_absolute"),
        Mark("layernorm_zero_centered_gamma", False, absent=False),
        Mark("multi_latent_attention", False, absent=False),
        Mark("num_moe_experts", None),
        Mark("rotary_interleaved", False, absent=False),
        Mark("rotary_percent", 1.0, absent=1.0),
        Mark("heterogeneous_block_specs", False, absent=False),
        Mark("qk_l2_norm", False, absent=False),
        Mark("attention_output_gate", False, absent=False),
        Mark("no_rope_freq", None),
        Mark("mtp_num_layers", None),
    ),
    fixed=_SHAPE,
    rows=(
        Key("vocab_size", "vocab_size", None, whole_number),
        Key("hidden_size", "hidden_size", into=whole_number),
        Key("max_positions", "max_sequence_length", 4096, whole_number),
        Key("layers", "num_layers", into=whole_number),
        Key("eps", "layernorm_epsilon", 1e-5, float),
        Key("tied", "share_embeddings_and_output_weights", False, bool),
        Key("heads", "num_attention_heads", into=whole_number),
        Key("kv_heads", "num_query_groups", lambda words: words["heads"], whole_number),
        Key("head_dim", "kv_channels", lambda words: words["hidden_size"] // words["heads"], whole_number),
        Key("intermediate", "ffn_hidden_size", into=whole_number),
        Key("rope_base", "rotary_base", 10000.0, float),
        Keys("rope_scaling", _megatron_scaling, _to_megatron_scaling),
        Key("out_bias", "add_bias_linear", True, bool),
        Key("ffn_bias", "add_bias_linear", True, bool),
        Keys(
            "qkv_bias",
            lambda config: bool(config.get("add_qkv_bias") or config.get("add_bias_linear", True)),
            lambda biased: {"add_qkv_bias": biased},
        ),
        Key("qk_norm", "qk_layernorm", False, bool),
        Keys(
            "window",
            lambda config: _window(config["window_size"]) if config.get("window_size") else None,
            lambda window: {"window_size": [window - 1, 0] if window else None},
        ),
    ),
)

_HUGGINGFACE_ROWS = (
    Key("vocab_size", "vocab_size", into=whole_number),
    Key("hidden_size", "hidden_size", into=whole_number),
    Key("max_positions", "max_position_embeddings", 2048, whole_number),
    Key("layers", "num_hidden_layers", into=whole_number),
    Key("eps", "rms_norm_eps", 1e-6, float),
    Key("tied", "tie_word_embeddings", False, bool),
    Key("heads", "num_attention_heads", into=whole_number),
    Key("kv_heads", "num_key_value_heads", lambda words: words["heads"], whole_number),
    Key("head_dim", "head_dim", lambda words: words["hidden_size"] // words["heads"], whole_number),
    Key("intermediate", "intermediate_size", into=whole_number),
    Keys(
        "rope_base",
        lambda config: float(_huggingface_rope(config).get("rope_theta") or 10000.0),
        lambda base: {"rope_theta": base},
    ),
    Keys("rope_scaling", _huggingface_scaling, lambda scaling: {"rope_scaling": _to_scaling(scaling)}),
)
_ATTENTION_BIAS = (Key("qkv_bias", "attention_bias", False, bool), Key("out_bias", "attention_bias", False, bool))


def _huggingface(
    model_type: str,
    architecture: str,
    *rows: Key | Keys,
    marks: tuple[Mark, ...] = (),
    fixed: Config | None = None,
) -> Dialect:
    said = {row.word for row in rows}
    unsaid = {word: value for word, value in (_PLAIN | dict(fixed or {})).items() if word not in said}
    return Dialect(
        marks=(Mark("model_type", model_type), Mark("hidden_act", "silu", absent="silu"), *marks),
        fixed=_SHAPE | unsaid,
        rows=(*_HUGGINGFACE_ROWS, *rows),
        constants={"architectures": [architecture], "use_cache": True},
    )


_NO_WINDOW = (Mark("use_sliding_window", False, absent=False),)
HUGGINGFACE = (
    _huggingface("llama", "LlamaForCausalLM", *_ATTENTION_BIAS, Key("ffn_bias", "mlp_bias", False, bool)),
    _huggingface("mistral", "MistralForCausalLM", Key("window", "sliding_window", None, whole_number)),
    _huggingface("qwen2", "Qwen2ForCausalLM", marks=_NO_WINDOW, fixed={"qkv_bias": True}),
    _huggingface("qwen3", "Qwen3ForCausalLM", *_ATTENTION_BIAS, marks=_NO_WINDOW, fixed={"qk_norm": True}),
)

_TRTLLM_ROWS = (
    Key("vocab_size", "vocab_size", into=whole_number),
    Key("hidden_size", "hidden_size", into=whole_number),
    Key("max_positions", "max_position_embeddings", into=whole_number),
    Key("layers", "num_hidden_layers", into=whole_number),
    Key("eps", "norm_epsilon", into=float),
    Key("tied", "share_embedding_table", False, bool),
    Key("heads", "num_attention_heads", into=whole_number),
    Key("kv_heads", "num_key_value_heads", into=whole_number),
    Key("head_dim", "head_size", into=whole_number),
    Key("intermediate", "intermediate_size", into=whole_number),
    Key("rope_base", "rotary_base", into=float),
    Keys(
        "rope_scaling",
        lambda config: _scaling(config.get("rotary_scaling") or {}),
        lambda scaling: {"rotary_scaling": _to_scaling(scaling)},
    ),
)


def _trtllm(architecture: str, *rows: Key | Keys, fixed: Config, constants: Config) -> Dialect:
    return Dialect(
        marks=(
            Mark("architecture", architecture),
            Mark("hidden_act", "silu"),
            Mark("position_embedding_type", "rope_gpt_neox"),
        ),
        fixed=_SHAPE | dict(fixed),
        rows=(*_TRTLLM_ROWS, *rows),
        constants=constants,
    )


TRTLLM = (
    _trtllm(
        "LlamaForCausalLM",
        Key("qkv_bias", "attn_bias", False, bool),
        Key("out_bias", "attn_bias", False, bool),
        Key("ffn_bias", "mlp_bias", False, bool),
        fixed={"window": None, "qk_norm": False},
        constants={
            "residual_mlp": False,
            "disable_weight_only_quant_plugin": False,
            "remove_duplicated_kv_heads": False,
        },
    ),
    _trtllm(
        "Qwen2ForCausalLM",
        fixed=_PLAIN | {"qkv_bias": True},
        constants={
            "qwen_type": "qwen2",
            "attn_bias": True,
            "mlp_bias": False,
            "disable_weight_only_quant_plugin": False,
        },
    ),
)

COLUMNS = {
    "megatron": Column(rules=MEGATRON_RULES, dialects=(MEGATRON,), tied_copy="output_layer.weight"),
    "huggingface": Column(rules=HUGGINGFACE_RULES, dialects=HUGGINGFACE, tied_copy="lm_head.weight"),
    "trtllm": Column(rules=TRTLLM_RULES, dialects=TRTLLM),
}
