"""Megatron-core's words, of `TransformerConfig` and `GPTModel`, as rows and marks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemoport.exporters.configs import (
    AnyOf,
    Config,
    Dialect,
    Key,
    Keys,
    Mark,
    Row,
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
from nemoport.spec import LinearScaling, Llama3Scaling


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
    Mark("mtp_num_layers", None),
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
)
"""All blocks are of one kind."""
TANH = ("openai_gelu", "fast_gelu", "openai_gelu_func")
"""Names of the approximated GELU in NeMo, Megatron-core and Megatron-Bridge."""


def _megatron_gelu(config: Config) -> str:
    """Megatron's fused bias and GELU is the approximation, whatever its name says (fusions/fused_bias_gelu.py)."""
    fused = flag(config.get("bias_activation_fusion") or False)
    return "gelu_tanh" if fused or config.get("activation_func") in TANH else "gelu"


_TO_GELU = {"gelu": {"activation_func": "gelu"}, "gelu_tanh": {"activation_func": "fast_gelu"}}
MEGATRON_GELU = Keys("activation", _megatron_gelu, lambda name: dict(_TO_GELU.get(name, {})))


def megatron(
    *rows: Row,
    marks: Marks,
    fixed: Mapping[str, Any],
    constants: Mapping[str, Any] | None = None,
    blocks: Marks = ALIKE,
) -> Dialect:
    return Dialect(
        marks=(*marks, *blocks, *_NOT_YET),
        rows=(*without(_MEGATRON_ROWS, rows), *rows),
        fixed=fixed,
        constants=constants or {},
    )
