"""Keys that families share: Megatron-core's, Hugging Face's and TensorRT-LLM's, as rows. A family adds what its own
configs say, and marks them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemoport.errors import UnsupportedInput
from nemoport.exporters.configs import Config, Dialect, Key, Keys, Mark, Row, choice, flag, layers, number, whole_number
from nemoport.spec import LinearScaling, Llama3Scaling

Scaling = LinearScaling | Llama3Scaling | None
Marks = tuple[Mark, ...]


def biased(key: str, *words: str, default: Any = False) -> tuple[Key, ...]:
    """One key for the biases of several linears."""
    return tuple(Key(word, key, default, flag) for word in words)


def root_of_scalar(key: str) -> Keys:
    """Scores are divided by the root of a number that is not the size of a head."""
    return Keys(
        "scale", lambda config: whole_number(config[key]) ** -0.5, lambda scale: {key: scale and round(scale**-2)}
    )


def scaled_by_root(key: str) -> Keys:
    """Embeddings are multiplied with the root of the hidden size, which no config says."""
    return Keys("embedding_scale", lambda config: whole_number(config[key]) ** 0.5, lambda scale: {})


# Megatron-core ---------------------------------------------------------------


def _megatron_scaling(config: Config) -> Scaling:
    """Three ways to say it: NeMo's Llama31Config, Megatron-core's `rope_scaling`, and interpolation."""
    if config.get("scale_factor") is not None and config.get("old_context_len") is not None:
        return Llama3Scaling(
            factor=number(config["scale_factor"]),
            low_freq_factor=number(config.get("low_freq_factor") or 1.0),
            high_freq_factor=number(config.get("high_freq_factor") or 4.0),
            original_max_positions=whole_number(config["old_context_len"]),
        )
    if config.get("rope_scaling"):
        return Llama3Scaling(factor=number(config.get("rope_scaling_factor") or 8.0))
    if factor := config.get("seq_len_interpolation_factor"):
        return LinearScaling(factor=number(factor))
    return None


def _to_megatron_scaling(scaling: Scaling) -> dict[str, Any]:
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


def megatron_window(value: Any) -> int:
    """Megatron-core's (left, right): `left` positions before the current one, none after."""
    left, right = (value, 0) if isinstance(value, int) else value
    if right:
        raise ValueError(value)
    return whole_number(left) + 1


def to_megatron_window(window: int | None) -> list[int] | None:
    return [window - 1, 0] if window else None


MEGATRON_ROPE: tuple[Row, ...] = (
    Key("rope_base", "rotary_base", 10000.0, number),
    Keys("rope_scaling", _megatron_scaling, _to_megatron_scaling),
)
MEGATRON_WINDOW: tuple[Row, ...] = (
    Keys(
        "window",
        lambda config: megatron_window(config["window_size"]) if config.get("window_size") else None,
        lambda window: {"window_size": to_megatron_window(window)},
    ),
)
MEGATRON_SCALE: tuple[Row, ...] = (Key("scale", "softmax_scale", None, number),)
MEGATRON_FRACTION = Key("rope_fraction", "rotary_percent", 1.0, number)
_MEGATRON_ROWS: tuple[Row, ...] = (
    Key("vocab_size", "vocab_size", None, whole_number),
    Key("hidden_size", "hidden_size", into=whole_number),
    Key("max_positions", "max_sequence_length", 4096, whole_number),
    Key("layers", "num_layers", into=layers),
    Key("eps", "layernorm_epsilon", 1e-5, number),
    Key("tied", "share_embeddings_and_output_weights", False, flag),
    Key("heads", "num_attention_heads", into=whole_number),
    Key("kv_heads", "num_query_groups", lambda words: words["heads"], whole_number),
    Key("head_dim", "kv_channels", lambda words: words["hidden_size"] // words["heads"], whole_number),
    Key("intermediate", "ffn_hidden_size", into=whole_number),
    *biased("add_bias_linear", "out_bias", "ffn_bias", default=True),
    Keys(
        "qkv_bias",
        lambda config: flag(config.get("add_qkv_bias") or config.get("add_bias_linear", True)),
        lambda has: {"add_qkv_bias": has},
    ),
)
ROTARY = (
    Mark("position_embedding_type", "rope", absent="learned_absolute"),
    Mark("rotary_interleaved", False, absent=False),
)
WHOLE_HEADS = (Mark("rotary_percent", 1.0, absent=1.0),)
ONE_WINDOW = (Mark("window_attn_skip_freq", None),)
RMS = (Mark("normalization", "RMSNorm", absent="LayerNorm"),)
LAYER_NORM = (Mark("normalization", "LayerNorm", absent="LayerNorm"),)
UNGATED = (Mark("gated_linear_unit", False, absent=False),)
GATED = (Mark("gated_linear_unit", True, absent=False),)


def centered(yes: bool) -> Marks:
    return (Mark("layernorm_zero_centered_gamma", yes, absent=False),)


_NOT_YET = (
    Mark("multi_latent_attention", False, absent=False),
    Mark("num_moe_experts", None),
    Mark("heterogeneous_block_specs", False, absent=False),
    Mark("qk_l2_norm", False, absent=False),
    Mark("attention_output_gate", False, absent=False),
    Mark("no_rope_freq", None),
    Mark("mtp_num_layers", None),
    Mark("apply_residual_connection_post_layernorm", False, absent=False),
    # NeMo 1.0's own
    Mark("apply_embedding_scaling", False, absent=False),
    Mark("transformer_block_type", "pre_ln", absent="pre_ln"),
    Mark("normalize_attention_scores", True, absent=True),
    Mark("multi_query_attention", False, absent=False),
    Mark("headscale", False, absent=False),
)

TANH = ("openai_gelu", "fast_gelu", "openai_gelu_func")
"""Names of the approximated GELU in NeMo, Megatron-core and Megatron-Bridge."""


def _megatron_gelu(config: Config) -> str:
    """Megatron's fused bias and GELU is the approximation, whatever its name says (fusions/fused_bias_gelu.py)."""
    fused = flag(config.get("bias_activation_fusion") or False)
    return "gelu_tanh" if fused or config.get("activation_func") in TANH else "gelu"


_TO_GELU = {"gelu": {"activation_func": "gelu"}, "gelu_tanh": {"activation_func": "fast_gelu"}}
MEGATRON_GELU = Keys("activation", _megatron_gelu, lambda name: dict(_TO_GELU.get(name, {})))


def megatron(*rows: Row, marks: Marks, fixed: Mapping[str, Any], constants: Mapping[str, Any] | None = None) -> Dialect:
    return Dialect(marks=(*marks, *_NOT_YET), rows=(*_MEGATRON_ROWS, *rows), fixed=fixed, constants=constants or {})


# Hugging Face ----------------------------------------------------------------


def huggingface_rope(config: Config) -> Config:
    """transformers 5 gathers in `rope_parameters` what 4 had in `rope_theta` and `rope_scaling`."""
    return config.get("rope_parameters") or {
        "rope_theta": config.get("rope_theta"),
        **(config.get("rope_scaling") or {}),
    }


def scaling_of(rope: Config) -> Scaling:
    match kind := rope.get("rope_type") or rope.get("type") or "default":
        case "default":
            return None
        case "linear":
            return LinearScaling(factor=number(rope["factor"]))
        case "llama3":
            return Llama3Scaling(
                factor=number(rope["factor"]),
                low_freq_factor=number(rope["low_freq_factor"]),
                high_freq_factor=number(rope["high_freq_factor"]),
                original_max_positions=whole_number(rope["original_max_position_embeddings"]),
            )
    raise UnsupportedInput(f"the config scales rope by {kind!r}; nemoport knows default, linear and llama3")


def to_scaling(scaling: Scaling) -> dict[str, Any] | None:
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


HUGGINGFACE_ROPE: tuple[Row, ...] = (
    Keys(
        "rope_base",
        lambda config: number(huggingface_rope(config).get("rope_theta") or 10000.0),
        lambda base: {"rope_theta": base},
    ),
    Keys(
        "rope_scaling",
        lambda config: scaling_of(huggingface_rope(config)),
        lambda scaling: {"rope_scaling": to_scaling(scaling)},
    ),
)


def huggingface_fraction(default: float) -> Keys:
    return Keys(
        "rope_fraction",
        lambda config: number(
            huggingface_rope(config).get("partial_rotary_factor") or config.get("partial_rotary_factor") or default
        ),
        lambda fraction: {"partial_rotary_factor": fraction},
    )


DIVIDED = Key("head_dim", "head_dim", lambda words: words["hidden_size"] // words["heads"], whole_number)
UNSAID = Keys("head_dim", lambda config: config["hidden_size"] // config["num_attention_heads"], lambda size: {})
"""The size of a head where the config has no key for it."""


def huggingface_sizes(
    eps: Key, *, tied: bool = False, head_dim: Row = DIVIDED, positions: int = 2048
) -> tuple[Row, ...]:
    """`tied` and `positions` are what an absent key means."""
    return (
        Key("vocab_size", "vocab_size", into=whole_number),
        Key("hidden_size", "hidden_size", into=whole_number),
        Key("max_positions", "max_position_embeddings", positions, whole_number),
        Key("layers", "num_hidden_layers", into=layers),
        eps,
        Key("tied", "tie_word_embeddings", tied, flag),
        Key("heads", "num_attention_heads", into=whole_number),
        Key("kv_heads", "num_key_value_heads", lambda words: words["heads"], whole_number),
        head_dim,
        Key("intermediate", "intermediate_size", into=whole_number),
    )


def softcap(word: str, key: str, absent: float | None = None) -> Keys:
    """A bound whose null is no bound, whatever its absence means."""

    def of(config: Config) -> float | None:
        return None if (value := config.get(key, absent)) is None else number(value)

    return Keys(word, of, lambda bound: {key: bound})


RMS_EPS = Key("eps", "rms_norm_eps", 1e-6, number)
HUGGINGFACE_ACTIVATIONS = {
    "silu": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
    "relu2": "relu2",
}


def huggingface(
    model_type: str,
    architecture: str,
    *rows: Row,
    marks: Marks = (),
    fixed: Mapping[str, Any] | None = None,
    constants: Mapping[str, Any] | None = None,
) -> Dialect:
    return Dialect(
        marks=(Mark("model_type", model_type), *marks),
        rows=rows,
        fixed=fixed or {},
        constants={"architectures": [architecture], "use_cache": True, **(constants or {})},
    )


# TensorRT-LLM ----------------------------------------------------------------


TRTLLM_ROPE: tuple[Row, ...] = (
    Key("rope_base", "rotary_base", into=number),
    Keys(
        "rope_scaling",
        lambda config: scaling_of(config.get("rotary_scaling") or {}),
        lambda scaling: {"rotary_scaling": to_scaling(scaling)},
    ),
)
_TRTLLM_ROWS: tuple[Row, ...] = (
    Key("vocab_size", "vocab_size", into=whole_number),
    Key("hidden_size", "hidden_size", into=whole_number),
    Key("max_positions", "max_position_embeddings", into=whole_number),
    Key("layers", "num_hidden_layers", into=layers),
    Key("eps", "norm_epsilon", into=number),
    Key("tied", "share_embedding_table", False, flag),
    Key("heads", "num_attention_heads", into=whole_number),
    Key("kv_heads", "num_key_value_heads", into=whole_number),
    Key("head_dim", "head_size", into=whole_number),
    Key("intermediate", "intermediate_size", into=whole_number),
)
TRTLLM_ROTARY = (Mark("position_embedding_type", "rope_gpt_neox"),)
TRTLLM_GELU = choice("activation", "hidden_act", {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"})
"""Of every name, TensorRT-LLM computes the approximation: the exact one cannot be said."""


def trtllm(
    architecture: str,
    *rows: Row,
    marks: Marks = (),
    fixed: Mapping[str, Any] | None = None,
    constants: Mapping[str, Any] | None = None,
) -> Dialect:
    return Dialect(
        marks=(Mark("architecture", architecture), *marks),
        rows=(*_TRTLLM_ROWS, *rows),
        fixed=fixed or {},
        constants=constants or {},
    )


def no_experts(normalization_mode: int | None) -> dict[str, Any]:
    """What the format says of experts where there are none."""
    return {
        "num_experts": 0,
        "shared_expert_intermediate_size": 0,
        "top_k": 0,
        "normalization_mode": normalization_mode,
        "sparse_mixer_epsilon": 0.01,
        "tp_mode": 0,
        "device_limited_n_group": 0,
        "device_limited_topk_group": 0,
        "device_limited_routed_scaling_factor": 1.0,
    }


OF_GPT: Mapping[str, Any] = {
    "q_scaling": 1,
    "embedding_scale": None,
    "apply_query_key_layer_scaling": False,
    "inner_layernorm": False,
    "norm_before_bmm1": False,
    "moe": no_experts(1),
}
"""What TensorRT-LLM's GPT class says of every model."""
