"""Megatron-core's words, of `TransformerConfig` and `GPTModel`, as rows and marks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemoport.exporters.configs import (
    MOST_LAYERS,
    PRESENT,
    AnyOf,
    Config,
    Dialect,
    Key,
    Keys,
    Mark,
    NoneOf,
    Row,
    Together,
    flag,
    layers,
    number,
    whole_number,
)
from nemoport.exporters.dialects.rows import (
    Marks,
    Scaling,
    biased,
    without,
)
from nemoport.exporters.words import Words, by_layer, collapsed
from nemoport.spec import Groups, LinearScaling, Llama3Scaling


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
    Mark("qk_l2_norm", False, absent=False),
    Mark("attention_output_gate", False, absent=False),
    Mark("no_rope_freq", None),
    Mark("apply_residual_connection_post_layernorm", False, absent=False),
    # NeMo 1.0's own
    Mark("apply_embedding_scaling", False, absent=False),
    Mark("transformer_block_type", "pre_ln", absent="pre_ln"),
    Mark("normalize_attention_scores", True, absent=True),
    Mark("multi_query_attention", False, absent=False),
    Mark("headscale", False, absent=False),
)
ALIKE = (
    Mark("heterogeneous_block_specs", False, absent=False),
    Mark("heterogeneous_layers_config_encoded_json", AnyOf((None, ""))),
    Mark("hybrid_override_pattern", None),
)
"""All blocks are of one kind."""
CAUSAL = (Mark("attn_mask_type", "causal", absent="causal"),)
BIDIRECTIONAL = (Mark("attn_mask_type", "padding", absent="causal"),)
"""Of two names that Megatron-core has for masks: what a position sees."""
TANH = ("openai_gelu", "fast_gelu", "openai_gelu_func")
"""Names of the approximated GELU in NeMo, Megatron-core and Megatron-Bridge."""


def _megatron_gelu(config: Config) -> str:
    """Megatron's fused bias and GELU is the approximation, whatever its name says (fusions/fused_bias_gelu.py)."""
    fused = flag(config.get("bias_activation_fusion") or False)
    return "gelu_tanh" if fused or config.get("activation_func") in TANH else "gelu"


_TO_GELU = {"gelu": {"activation_func": "gelu"}, "gelu_tanh": {"activation_func": "fast_gelu"}}
MEGATRON_GELU = Keys("activation", _megatron_gelu, lambda name: dict(_TO_GELU.get(name, {})))


def _kinds(config: Config) -> Words:
    """`moe_layer_freq` n: every nth layer from the first on has experts; or a 1 for each that has, 0 for the others."""
    count, every = layers(config["num_layers"]), config.get("moe_layer_freq") or 1
    if isinstance(every, str):  # of the command line: ([0]*1+[1]*26)
        every = _pattern(every)
    has = [layer % whole_number(every) == 0 for layer in range(count)] if not isinstance(every, list) else every
    if len(has) != count or not all(each in (0, 1) for each in has):
        raise ValueError(f"moe_layer_freq {every!r} of {count} layers")
    return {"ffn": collapsed(["mixture" if each else "dense" for each in has])}


def _pattern(text: str) -> list[int] | int:
    """Lists of numbers, repeated and joined: what Megatron-LM evaluates, read without evaluating it."""
    if text.strip().isdecimal():
        return int(text)
    found: list[int] = []
    for term in text.replace(" ", "").replace("(", "").replace(")", "").split("+"):
        numbers, _, times = term.partition("*")
        found += [int(number) for number in numbers.strip("[]").split(",")] * int(times or 1)
        if len(found) > MOST_LAYERS:
            raise ValueError(text)
    return found


def _to_kinds(words: Words) -> dict[str, Any]:
    return {"moe_layer_freq": [int(kind == "mixture") for kind in by_layer(words, "ffn")]}


def _scores(config: Config) -> Words:
    """A softmax after the choice is a normalized one; sigmoids are always divided by their sum, a single one is not
    (topk_routing_with_score_function of moe_utils.py)."""
    score, before = (
        config.get("moe_router_score_function") or "softmax",
        flag(config.get("moe_router_pre_softmax", False)),
    )
    if score not in ("softmax", "sigmoid"):
        raise ValueError(score)
    if score == "softmax" and not before and config.get("moe_router_group_topk"):
        raise ValueError("groups of experts by their logits, which nemoport does not know")
    alone = (config.get("moe_router_topk") or 2) == 1
    return {"router_score": score, "router_normalized": not alone if score == "sigmoid" else not before}


def _to_scores(words: Words) -> dict[str, Any]:
    before = words["router_score"] == "softmax" and not words["router_normalized"]
    return {"moe_router_score_function": words["router_score"], "moe_router_pre_softmax": before}


def _groups(config: Config) -> Groups | None:
    """A group's score is the sum of its best `topk // group_topk` (group_limited_topk of moe_utils.py). Groups of which
    all may be chosen are none."""
    if not config.get("moe_router_group_topk"):
        return None
    keys = ("moe_router_num_groups", "moe_router_group_topk", "moe_router_topk")
    count, top, top_k = (whole_number(config[key]) for key in keys)
    return Groups(count, top, top_k // top) if top < count else None


def _to_groups(groups: Groups | None) -> dict[str, Any]:
    return {
        "moe_router_num_groups": groups and groups.count,
        "moe_router_group_topk": groups and groups.top,
    }


MEGATRON_EXPERTS: tuple[Row, ...] = (
    Key("intermediate", "ffn_hidden_size", lambda words: 4 * words["hidden_size"], whole_number),
    Together(("ffn",), _kinds, _to_kinds),
    Key("experts", "num_moe_experts", into=whole_number),
    Key("top_k", "moe_router_topk", 2, whole_number),
    Key("expert_intermediate", "moe_ffn_hidden_size", lambda words: words["intermediate"], whole_number),
    Together(("router_score", "router_normalized"), _scores, _to_scores),
    Key("router_scale", "moe_router_topk_scaling_factor", 1.0, number),
    Keys("expert_groups", _groups, _to_groups),
    Key("expert_bias", "moe_router_enable_expert_bias", False, flag),
    Key("shared_intermediate", "moe_shared_expert_intermediate_size", None, whole_number),
    Key("shared_gate", "moe_shared_expert_gate", False, flag),
    *biased("add_bias_linear", "router_bias", default=True),
)
WITH_EXPERTS = (
    Mark("num_moe_experts", PRESENT),
    Mark("moe_router_load_balancing_type", NoneOf(("sinkhorn", ["sinkhorn"]))),
    Mark("moe_expert_capacity_factor", None),
    Mark("moe_latent_size", None),
    Mark("moe_apply_probs_on_input", False, absent=False),
)
"""Routing that depends on the other tokens of a batch, or that lets tokens go, has no counterpart outside training."""

NO_SINKS = (Mark("softmax_type", "vanilla", absent="vanilla"), Mark("activation_func_clamp_value", None))


def megatron(
    *rows: Row,
    marks: Marks,
    fixed: Mapping[str, Any],
    constants: Mapping[str, Any] | None = None,
    blocks: Marks = ALIKE,
    attention: Marks = CAUSAL,
) -> Dialect:
    own = {mark.key for mark in marks}
    return Dialect(
        marks=(*marks, *blocks, *attention, *(mark for mark in _NOT_YET if mark.key not in own)),
        rows=(*without(_MEGATRON_ROWS, rows), *rows),
        fixed=fixed,
        constants=constants or {},
    )
