"""Gemma 2 and 3 (text): Gemma with norms after each half too, windows in some layers, soft caps (2), norms on q and k
and a rope of its own for layers with a window (3).
"""

from __future__ import annotations

from typing import Any

from nemoport.exporters import naming
from nemoport.exporters.configs import (
    PRESENT,
    AnyOf,
    Config,
    Key,
    Keys,
    Mark,
    Row,
    Together,
    choice,
    layers,
    number,
    whole_number,
)
from nemoport.exporters.dialects.huggingface import HUGGINGFACE_ROPE, RMS_EPS, huggingface, huggingface_sizes
from nemoport.exporters.dialects.kinds import GLOBAL, LOCAL, first, kinds_of, known, or_none, ropes, windows
from nemoport.exporters.dialects.megatron import (
    GATED,
    MEGATRON_ROPE,
    RMS,
    ROTARY,
    TANH,
    WHOLE_HEADS,
    centered,
    megatron,
    megatron_window,
    to_megatron_window,
)
from nemoport.exporters.dialects.rows import Scaling, biased, scaled_by_root, scaling_of, softcap, to_scaling
from nemoport.exporters.dialects.trtllm import TRTLLM_ROPE, TRTLLM_ROTARY, trtllm
from nemoport.exporters.layouts import PLUS_ONE
from nemoport.exporters.rules import Column
from nemoport.exporters.words import Words
from nemoport.spec import LinearScaling

_SHAPE = {"zero_centered": True, "activation": "gelu_tanh", "post_norms": True}
_SHAPE_OF_3 = _SHAPE | {"qk_norm": True}
_SCALED = scaled_by_root("hidden_size")


def _scalar(absent: int | None = None) -> Keys:
    """Scores are divided by the root of a number that need not be the size of a head."""
    key = "query_pre_attn_scalar"
    return Keys(
        "scale",
        lambda config: number(config.get(key, absent)) ** -0.5,
        lambda scale: {key: _whole(scale**-2) if scale else None},
    )


def _whole(value: float) -> float | int:
    return round(value) if abs(value - round(value)) < 1e-6 * value else value


# Megatron-core, as NeMo and Megatron-Bridge configure it: every other layer from the first on has a window in Gemma 2,
# five of six in Gemma 3.


def _megatron(*rows: Row, marks: tuple[Mark, ...], fixed: Words) -> Any:
    shared = (*RMS, *centered(True), *GATED, *ROTARY, *WHOLE_HEADS)
    gelu = Mark("activation_func", AnyOf(TANH), absent="gelu")
    constants = {"activation_func": "fast_gelu"}
    return megatron(*rows, _SCALED, marks=(*shared, gelu, *marks), fixed=fixed, constants=constants)


def _alternating(config: Config) -> list[str]:
    return [GLOBAL if layer % 2 else LOCAL for layer in range(layers(config["num_layers"]))]


def _pattern(config: Config) -> list[str]:
    """[5, 1]: five layers with a window, then one without; or the name of each layer's kind."""
    pattern = config["interleaved_attn_pattern"]
    if isinstance(pattern[0], str):
        return known(pattern, config["num_layers"])
    near, far = map(whole_number, pattern)
    return [LOCAL if layer % (near + far) < near else GLOBAL for layer in range(layers(config["num_layers"]))]


def _softmax_scale(config: Config) -> float:
    """Of a whole number the root as `_scalar` computes it: other programs round otherwise."""
    scale = number(config["softmax_scale"])
    return float(_whole(scale**-2) ** -0.5)


def _global_rope(config: Config) -> tuple[float, Scaling]:
    factor = number(config.get("rope_scaling_factor") or 1.0)
    return number(config["rotary_base"][1]), None if factor == 1 else LinearScaling(factor=factor)


def _to_megatron_3(words: Words) -> dict[str, Any]:
    scaling = first(words, "rope_scaling", GLOBAL)
    bases = (first(words, "rope_base", kind, _BASES[kind]) for kind in (LOCAL, GLOBAL))
    return {
        "window_size": first(words, "window", LOCAL),
        "interleaved_attn_pattern": kinds_of(words),
        "rotary_base": list(bases),
        "rope_scaling_factor": getattr(scaling, "factor", 1.0),
    }


_BASES = {LOCAL: 10_000.0, GLOBAL: 1_000_000.0}
MEGATRON = (
    _megatron(
        *MEGATRON_ROPE,
        Together(
            ("window",),
            windows(_alternating, lambda config: or_none(megatron_window, config.get("window_size"))),
            lambda words: {"window_size": to_megatron_window(first(words, "window", LOCAL))},
        ),
        _scalar(),
        softcap("softcap", "attn_logit_softcapping"),
        softcap("logit_softcap", "final_logit_softcapping"),
        marks=(
            Mark("query_pre_attn_scalar", PRESENT),
            Mark("interleaved_attn_pattern", None),
            Mark("qk_layernorm", False, absent=False),
        ),
        fixed=_SHAPE,
    ),
    _megatron(
        Together(
            ("window", "rope_base", "rope_scaling"),
            ropes(
                _pattern,
                lambda config: or_none(whole_number, config.get("window_size")),
                lambda config: number(config["rotary_base"][0]),
                _global_rope,
            ),
            _to_megatron_3,
        ),
        Keys("scale", _softmax_scale, lambda scale: {"softmax_scale": scale}),
        marks=(Mark("interleaved_attn_pattern", PRESENT),),
        fixed=_SHAPE_OF_3,
    ),
)


# Hugging Face: `layer_types`, or what its absence means.


def _kinds(config: Config) -> list[str]:
    if kinds := config.get("layer_types"):
        return known(kinds, config["num_hidden_layers"])
    turn = 2 if config["model_type"] == "gemma2" else config.get("sliding_window_pattern", 6)
    return [LOCAL if (layer + 1) % turn else GLOBAL for layer in range(layers(config["num_hidden_layers"]))]


def _window(config: Config) -> int | None:
    return or_none(whole_number, config.get("sliding_window", 4096))


def _rope_of(config: Config, kind: str) -> Config:
    """transformers 5 has a mapping for each kind of layer, 4 had keys."""
    if ropes := config.get("rope_parameters"):
        return ropes.get(kind) or {}
    if kind == LOCAL:
        return {"rope_theta": config.get("rope_local_base_freq")}
    return {"rope_theta": config.get("rope_theta"), **(config.get("rope_scaling") or {})}


def _base_of(config: Config, kind: str) -> float:
    return number(_rope_of(config, kind).get("rope_theta") or _BASES[kind])


def _to_huggingface(words: Words) -> dict[str, Any]:
    return {"layer_types": kinds_of(words), "sliding_window": first(words, "window", LOCAL)}


def _to_huggingface_3(words: Words) -> dict[str, Any]:
    return _to_huggingface(words) | {
        "rope_theta": first(words, "rope_base", GLOBAL, _BASES[GLOBAL]),
        "rope_local_base_freq": first(words, "rope_base", LOCAL, _BASES[LOCAL]),
        "rope_scaling": to_scaling(first(words, "rope_scaling", GLOBAL)),
    }


def _huggingface(model_type: str, architecture: str, *rows: Row, positions: int, fixed: Words) -> Any:
    head_dim = Key("head_dim", "head_dim", 256, whole_number)
    return huggingface(
        model_type,
        architecture,
        *huggingface_sizes(RMS_EPS, tied=True, head_dim=head_dim, positions=positions),
        *biased("attention_bias", "qkv_bias", "out_bias"),
        _SCALED,
        _scalar(256),
        *rows,
        marks=(
            Mark("hidden_activation", "gelu_pytorch_tanh", absent="gelu_pytorch_tanh"),
            Mark("use_bidirectional_attention", False, absent=False),
        ),
        fixed=fixed,
    )


HUGGINGFACE = (
    _huggingface(
        "gemma2",
        "Gemma2ForCausalLM",
        *HUGGINGFACE_ROPE,
        Together(("window",), windows(_kinds, _window), _to_huggingface),
        softcap("softcap", "attn_logit_softcapping", 50.0),
        softcap("logit_softcap", "final_logit_softcapping", 30.0),
        positions=8192,
        fixed=_SHAPE,
    ),
    _huggingface(
        "gemma3_text",
        "Gemma3ForCausalLM",
        Together(
            ("window", "rope_base", "rope_scaling"),
            ropes(
                _kinds,
                _window,
                lambda config: _base_of(config, LOCAL),
                lambda config: (_base_of(config, GLOBAL), scaling_of(_rope_of(config, GLOBAL))),
            ),
            _to_huggingface_3,
        ),
        softcap("softcap", "attn_logit_softcapping"),
        softcap("logit_softcap", "final_logit_softcapping"),
        positions=131_072,
        fixed=_SHAPE_OF_3,
    ),
)
_HUGGINGFACE_NORMS = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "attn_post_norm.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight",
    "post_feedforward_layernorm.weight": "ffn_post_norm.weight",
}

TRTLLM = trtllm(
    "Gemma2ForCausalLM",
    *TRTLLM_ROPE,
    *biased("attn_bias", "qkv_bias", "out_bias"),
    *biased("mlp_bias", "ffn_bias"),
    choice("activation", "hidden_act", {"gelu_pytorch_tanh": "gelu_tanh"}),
    _SCALED,
    _scalar(),
    softcap("softcap", "attn_logit_softcapping"),
    softcap("logit_softcap", "final_logit_softcapping"),
    marks=(*TRTLLM_ROTARY, Mark("share_embedding_table", True)),
    fixed=_SHAPE,
    constants={"inter_layernorms": True},
)
_TRTLLM_NORMS = {
    "input_layernorm": "attn_norm",
    "post_layernorm": "attn_post_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "ffn_post_norm",
}

COLUMNS = {
    "megatron": Column(rules=naming.MEGATRON_GATED, dialects=MEGATRON, tied_copy="output_layer.weight"),
    "huggingface": Column(
        rules=(
            *naming.HUGGINGFACE_ENDS,
            *naming.HUGGINGFACE_ATTENTION,
            *naming.layer(naming.HUGGINGFACE_LAYER, _HUGGINGFACE_NORMS),
            *naming.HUGGINGFACE_FFN,
        ),
        dialects=HUGGINGFACE,
        tied_copy="lm_head.weight",
    ),
    "trtllm": Column(
        rules=(*naming.TRTLLM_GATED, *naming.trtllm_norms(_TRTLLM_NORMS, PLUS_ONE)),
        dialects=(TRTLLM,),
        own_head=False,
    ),
}
