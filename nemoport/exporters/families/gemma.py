"""Gemma: RMSNorm whose weights are stored less one, embeddings scaled by the root of the hidden size, GELU gates."""

from __future__ import annotations

from nemoport.exporters import naming
from nemoport.exporters.configs import AnyOf, Key, Mark, choice, whole_number
from nemoport.exporters.dialects.huggingface import HUGGINGFACE_ROPE, RMS_EPS, huggingface, huggingface_sizes
from nemoport.exporters.dialects.megatron import (
    GATED,
    MEGATRON_ROPE,
    MEGATRON_SCALE,
    RMS,
    ROTARY,
    TANH,
    WHOLE_HEADS,
    centered,
    megatron,
)
from nemoport.exporters.dialects.rows import biased, scaled_by_root
from nemoport.exporters.dialects.trtllm import TRTLLM_ROPE, TRTLLM_ROTARY, trtllm
from nemoport.exporters.layouts import PLUS_ONE
from nemoport.exporters.rules import Column

_SHAPE = {"zero_centered": True, "activation": "gelu_tanh"}

MEGATRON = megatron(
    *MEGATRON_ROPE,
    *MEGATRON_SCALE,
    scaled_by_root("hidden_size"),
    marks=(
        *RMS,
        *centered(True),
        *GATED,
        Mark("activation_func", AnyOf(TANH), absent="gelu"),
        *ROTARY,
        *WHOLE_HEADS,
        Mark("window_size", None),
        Mark("qk_layernorm", False, absent=False),
        Mark("query_pre_attn_scalar", None),
        Mark("interleaved_attn_pattern", None),
    ),
    fixed=_SHAPE,
    constants={"activation_func": "fast_gelu"},
)

HUGGINGFACE = huggingface(
    "gemma",
    "GemmaForCausalLM",
    *huggingface_sizes(RMS_EPS, tied=True, head_dim=Key("head_dim", "head_dim", 256, whole_number), positions=8192),
    *HUGGINGFACE_ROPE,
    *biased("attention_bias", "qkv_bias", "out_bias"),
    scaled_by_root("hidden_size"),
    marks=(
        # the first configs said `gelu` and meant the approximation
        Mark("hidden_act", AnyOf(("gelu_pytorch_tanh", "gelu")), absent="gelu"),
        Mark("use_bidirectional_attention", False, absent=False),
    ),
    fixed=_SHAPE,
    constants={"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"},
)

TRTLLM = trtllm(
    "GemmaForCausalLM",
    *TRTLLM_ROPE,
    *biased("attn_bias", "qkv_bias", "out_bias"),
    *biased("mlp_bias", "ffn_bias"),
    choice("activation", "hidden_act", {"gelu_pytorch_tanh": "gelu_tanh"}),
    scaled_by_root("hidden_size"),
    marks=(*TRTLLM_ROTARY, Mark("share_embedding_table", True)),
    fixed=_SHAPE,
    constants={"inter_layernorms": False},
)

COLUMNS = {
    "megatron": Column(rules=naming.MEGATRON_GATED, dialects=(MEGATRON,), tied_copy="output_layer.weight"),
    "huggingface": Column(rules=naming.HUGGINGFACE, dialects=(HUGGINGFACE,), tied_copy="lm_head.weight"),
    "trtllm": Column(
        rules=(*naming.TRTLLM_GATED, *naming.trtllm_norms(naming.TRTLLM_NORMS, PLUS_ONE)),
        dialects=(TRTLLM,),
        own_head=False,
    ),
}
