"""Nemotron-4 and Minitron: LayerNorm1p (weights stored less one), squared ReLU, rotary positions on part of a head."""

from __future__ import annotations

from nemoport.exporters import naming
from nemoport.exporters.configs import Key, Mark, number
from nemoport.exporters.dialects.huggingface import (
    HUGGINGFACE_ROPE,
    huggingface,
    huggingface_fraction,
    huggingface_sizes,
)
from nemoport.exporters.dialects.megatron import (
    LAYER_NORM,
    MEGATRON_FRACTION,
    MEGATRON_ROPE,
    MEGATRON_SCALE,
    ROTARY,
    UNGATED,
    centered,
    megatron,
)
from nemoport.exporters.dialects.rows import biased
from nemoport.exporters.dialects.trtllm import OF_GPT, TRTLLM_ROPE, TRTLLM_ROTARY, trtllm
from nemoport.exporters.layouts import PLUS_ONE
from nemoport.exporters.rules import Column

_SHAPE = {"norm": "layer", "zero_centered": True, "gated": False, "activation": "relu2"}

MEGATRON = megatron(
    *MEGATRON_ROPE,
    MEGATRON_FRACTION,
    *MEGATRON_SCALE,
    marks=(
        *LAYER_NORM,
        *centered(True),
        *UNGATED,
        Mark("activation_func", "squared_relu", absent="gelu"),
        *ROTARY,
        Mark("window_size", None),
        Mark("qk_layernorm", False, absent=False),
    ),
    fixed=_SHAPE,
)

HUGGINGFACE = huggingface(
    "nemotron",
    "NemotronForCausalLM",
    *huggingface_sizes(Key("eps", "norm_eps", 1e-5, number)),
    *HUGGINGFACE_ROPE,
    huggingface_fraction(0.5),
    *biased("attention_bias", "qkv_bias", "out_bias"),
    *biased("mlp_bias", "ffn_bias"),
    marks=(Mark("hidden_act", "relu2", absent="relu2"),),
    fixed=_SHAPE,
)

TRTLLM = trtllm(
    "NemotronForCausalLM",
    *TRTLLM_ROPE,
    Key("rope_fraction", "rotary_pct", 1.0, number),
    *biased("bias", "qkv_bias", "out_bias", "ffn_bias"),
    marks=(Mark("hidden_act", "squared-relu"), *TRTLLM_ROTARY),
    fixed=_SHAPE,
    constants={**OF_GPT, "gpt_variant": "nemotron"},
)

COLUMNS = {
    "megatron": Column(rules=naming.MEGATRON, dialects=(MEGATRON,), tied_copy="output_layer.weight"),
    "huggingface": Column(rules=naming.HUGGINGFACE, dialects=(HUGGINGFACE,), tied_copy="lm_head.weight"),
    "trtllm": Column(rules=(*naming.TRTLLM, *naming.trtllm_norms(naming.TRTLLM_NORMS, PLUS_ONE)), dialects=(TRTLLM,)),
}
