"""StableLM 2: Llama with LayerNorm and rotary positions on part of a head."""

from __future__ import annotations

from nemoport.exporters import naming
from nemoport.exporters.configs import Key, Mark, flag, number
from nemoport.exporters.dialects.huggingface import (
    HUGGINGFACE_ROPE,
    huggingface,
    huggingface_fraction,
    huggingface_sizes,
)
from nemoport.exporters.dialects.megatron import (
    GATED,
    LAYER_NORM,
    MEGATRON_FRACTION,
    MEGATRON_ROPE,
    ROTARY,
    centered,
    megatron,
)
from nemoport.exporters.rules import Column

_SHAPE = {"norm": "layer"}

HUGGINGFACE = huggingface(
    "stablelm",
    "StableLmForCausalLM",
    *huggingface_sizes(Key("eps", "layer_norm_eps", 1e-5, number)),
    *HUGGINGFACE_ROPE,
    huggingface_fraction(0.25),
    Key("qkv_bias", "use_qkv_bias", False, flag),
    marks=(
        Mark("hidden_act", "silu", absent="silu"),
        Mark("qk_layernorm", False, absent=False),
        Mark("use_parallel_residual", False, absent=False),
    ),
    fixed=_SHAPE,
)

MEGATRON = megatron(
    *MEGATRON_ROPE,
    MEGATRON_FRACTION,
    marks=(
        *LAYER_NORM,
        *centered(False),
        *GATED,
        Mark("activation_func", "silu", absent="gelu"),
        *ROTARY,
        Mark("window_size", None),
        Mark("qk_layernorm", False, absent=False),
    ),
    fixed=_SHAPE,
)

COLUMNS = {
    "huggingface": Column(rules=naming.HUGGINGFACE, dialects=(HUGGINGFACE,), tied_copy="lm_head.weight"),
    "megatron": Column(rules=naming.MEGATRON_GATED, dialects=(MEGATRON,), tied_copy="output_layer.weight"),
}
