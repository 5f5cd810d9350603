"""GPT-OSS: experts with biases, clamped and gated by the fast GELU, up-projections plus one; a sink in each head; every
other layer, from the first on, has a window; YaRN.

Its own checkpoints have experts in MXFP4, which nemoport does not read: those in 16 bits, as Megatron-Bridge and
transformers write them, are meant here.
"""

from __future__ import annotations

from typing import Any

from nemoport.exporters import naming
from nemoport.exporters.configs import AnyOf, Config, Key, Keys, Mark, Together, flag, layers, number, whole_number
from nemoport.exporters.dialects.huggingface import HUGGINGFACE_ROPE, experts, huggingface, huggingface_sizes
from nemoport.exporters.dialects.kinds import GLOBAL, LOCAL, first, kinds_of, known, or_none, windows
from nemoport.exporters.dialects.megatron import (
    GATED,
    MEGATRON_EXPERTS,
    MEGATRON_SCALE,
    RMS,
    WHOLE_HEADS,
    WITH_EXPERTS,
    centered,
    megatron,
    megatron_window,
    to_megatron_window,
)
from nemoport.exporters.dialects.rows import Scaling, biased
from nemoport.exporters.layouts import EXPERTS, EXPERTS_IN_TURNS, EXPERTS_IN_TURNS_TRANSPOSED, EXPERTS_TRANSPOSED
from nemoport.exporters.rules import Column
from nemoport.exporters.words import Words
from nemoport.spec import YarnScaling

_SHAPE = {"sinks": True, "activation": "quick_gelu", "up_offset": 1.0}

# Megatron-core: YaRN is a kind of position embedding, whose numbers have defaults in `YarnRotaryEmbedding`.


def _scaling(config: Config) -> Scaling:
    """`mscale` counts only where both are said (yarn_rotary_pos_embedding.py)."""
    if config["position_embedding_type"] == "rope":
        return None
    mscale, of_all_dims = (config.get(f"yarn_{name}") for name in ("mscale", "mscale_all_dim"))
    if mscale is None or of_all_dims is None:
        mscale, of_all_dims = 1.0, 0.0
    return YarnScaling(
        factor=number(config["yarn_rotary_scaling_factor"]),
        original_max_positions=whole_number(config["yarn_original_max_position_embeddings"]),
        beta_fast=number(config.get("yarn_beta_fast") or 32.0),
        beta_slow=number(config.get("yarn_beta_slow") or 1.0),
        mscale=float(mscale),
        mscale_all_dim=float(of_all_dims),
        truncate=flag(config.get("yarn_correction_range_round_to_int", True)),
    )


def _to_scaling(scaling: Scaling) -> dict[str, Any]:
    if not isinstance(scaling, YarnScaling):
        return {"position_embedding_type": "rope"}
    return {
        "position_embedding_type": "yarn",
        "yarn_rotary_scaling_factor": scaling.factor,
        "yarn_original_max_position_embeddings": scaling.original_max_positions,
        "yarn_beta_fast": scaling.beta_fast,
        "yarn_beta_slow": scaling.beta_slow,
        "yarn_mscale": scaling.mscale,
        "yarn_mscale_all_dim": scaling.mscale_all_dim,
        "yarn_correction_range_round_to_int": scaling.truncate,
    }


def _megatron_kinds(config: Config) -> list[str]:
    """Every layer has a window but each `window_attn_skip_freq`th; or a 1 for each that has, 0 for the others."""
    count, skip = layers(config["num_layers"]), config.get("window_attn_skip_freq")
    if config.get("window_size") is None:
        return [GLOBAL] * count
    if isinstance(skip, list):
        return known([LOCAL if each else GLOBAL for each in skip], count)
    return [LOCAL if skip is None or (layer + 1) % whole_number(skip) else GLOBAL for layer in range(count)]


def _to_megatron_windows(words: Words) -> dict[str, Any]:
    window = first(words, "window", LOCAL)
    return {
        "window_size": to_megatron_window(window),
        "window_attn_skip_freq": [int(kind == LOCAL) for kind in kinds_of(words)] if window else None,
    }


MEGATRON = megatron(
    Key("rope_base", "rotary_base", 10000.0, number),
    Keys("rope_scaling", _scaling, _to_scaling),
    Together(
        ("window",),
        windows(_megatron_kinds, lambda config: or_none(megatron_window, config.get("window_size"))),
        _to_megatron_windows,
    ),
    *MEGATRON_SCALE,
    *MEGATRON_EXPERTS,
    Key("ffn_limit", "activation_func_clamp_value", None, number),
    Key("up_offset", "glu_linear_offset", 0.0, float),
    marks=(
        *WITH_EXPERTS,
        Mark("softmax_type", "learnable", absent="vanilla"),
        *RMS,
        *GATED,
        Mark("activation_func", "quick_gelu", absent="gelu"),
        Mark("position_embedding_type", AnyOf(("yarn", "rope")), absent="learned_absolute"),
        Mark("rotary_interleaved", False, absent=False),
        *WHOLE_HEADS,
        *centered(False),
    ),
    fixed=_SHAPE,
)


def _kinds(config: Config) -> list[str]:
    count = layers(config["num_hidden_layers"])
    if kinds := config.get("layer_types"):
        return known(kinds, count)
    return [GLOBAL if layer % 2 else LOCAL for layer in range(count)]


HUGGINGFACE = huggingface(
    "gpt_oss",
    "GptOssForCausalLM",
    *huggingface_sizes(
        Key("eps", "rms_norm_eps", 1e-5, number),
        head_dim=Key("head_dim", "head_dim", 64, whole_number),
        positions=131_072,
    ),
    *HUGGINGFACE_ROPE,
    *biased("attention_bias", "qkv_bias", "out_bias", default=True),
    Together(
        ("window",),
        windows(_kinds, lambda config: or_none(whole_number, config.get("sliding_window", 128))),
        lambda words: {"layer_types": kinds_of(words), "sliding_window": first(words, "window", LOCAL)},
    ),
    *experts("num_local_experts", "intermediate_size"),
    Key("ffn_limit", "swiglu_limit", 7.0, number),
    marks=(
        Mark("hidden_act", "silu", absent="silu"),
        Mark("swiglu_alpha", 1.702, absent=1.702),
    ),
    fixed={**_SHAPE, "ffn": "mixture", "ffn_bias": True, "router_bias": True},
)
_EXPERTS = (
    *naming.layer(
        naming.HUGGINGFACE_LAYER,
        {
            "self_attn.sinks": "attn.sinks",
            "mlp.router.*": "ffn.router.*",
        },
    ),
    *naming.layer(
        naming.HUGGINGFACE_LAYER,
        {"mlp.experts.gate_up_proj": (naming.EVERY + "gate.weight", naming.EVERY + "up.weight")},
        EXPERTS_IN_TURNS_TRANSPOSED,
    ),
    *naming.layer(
        naming.HUGGINGFACE_LAYER,
        {"mlp.experts.gate_up_proj_bias": (naming.EVERY + "gate.bias", naming.EVERY + "up.bias")},
        EXPERTS_IN_TURNS,
    ),
    *naming.layer(
        naming.HUGGINGFACE_LAYER, {"mlp.experts.down_proj": naming.EVERY + "down.weight"}, EXPERTS_TRANSPOSED
    ),
    *naming.layer(naming.HUGGINGFACE_LAYER, {"mlp.experts.down_proj_bias": naming.EVERY + "down.bias"}, EXPERTS),
)

COLUMNS = {
    "megatron": Column(
        rules=(*naming.MEGATRON_GATED, *naming.MEGATRON_EXPERTS), dialects=(MEGATRON,), tied_copy="output_layer.weight"
    ),
    "huggingface": Column(
        rules=(
            *naming.HUGGINGFACE_ENDS,
            *naming.HUGGINGFACE_ATTENTION,
            *naming.HUGGINGFACE_NORMS,
            *_EXPERTS,
        ),
        dialects=(HUGGINGFACE,),
        tied_copy="lm_head.weight",
        loads=("transformers 4.55 or later", "vLLM", "SGLang"),
    ),
}
