"""StarCoder2: GPT with rotary positions instead of learned ones, grouped queries, and a window."""

from __future__ import annotations

from nemoport.exporters import naming
from nemoport.exporters.configs import AnyOf, Key, Mark, choice, number, whole_number
from nemoport.exporters.dialects.huggingface import (
    HUGGINGFACE_ACTIVATIONS,
    HUGGINGFACE_ROPE,
    huggingface,
    huggingface_sizes,
)
from nemoport.exporters.dialects.megatron import (
    LAYER_NORM,
    MEGATRON_FRACTION,
    MEGATRON_GELU,
    MEGATRON_ROPE,
    MEGATRON_SCALE,
    MEGATRON_WINDOW,
    ONE_WINDOW,
    ROTARY,
    TANH,
    UNGATED,
    centered,
    megatron,
)
from nemoport.exporters.dialects.rows import biased
from nemoport.exporters.dialects.trtllm import OF_GPT, TRTLLM_ROPE, TRTLLM_ROTARY, trtllm
from nemoport.exporters.rules import Column

_SHAPE = {"norm": "layer", "gated": False}
_BIASES = ("qkv_bias", "out_bias", "ffn_bias")

MEGATRON = megatron(
    *MEGATRON_ROPE,
    MEGATRON_FRACTION,
    *MEGATRON_WINDOW,
    *MEGATRON_SCALE,
    MEGATRON_GELU,
    marks=(
        *LAYER_NORM,
        *centered(False),
        *UNGATED,
        Mark("activation_func", AnyOf(("gelu", *TANH)), absent="gelu"),
        *ROTARY,
        *ONE_WINDOW,
        Mark("qk_layernorm", False, absent=False),
    ),
    fixed=_SHAPE,
)

_GELU = {name: ours for name, ours in HUGGINGFACE_ACTIVATIONS.items() if "gelu" in name}
HUGGINGFACE = huggingface(
    "starcoder2",
    "Starcoder2ForCausalLM",
    *huggingface_sizes(Key("eps", "norm_epsilon", 1e-5, number), tied=True, positions=4096),
    *HUGGINGFACE_ROPE,
    *biased("use_bias", *_BIASES, default=True),
    choice("activation", "hidden_act", _GELU, "gelu_tanh"),
    Key("window", "sliding_window", None, whole_number),
    fixed=_SHAPE,
)

TRTLLM = trtllm(
    "Starcoder2ForCausalLM",
    *TRTLLM_ROPE,
    Key("rope_fraction", "rotary_pct", 1.0, number),
    *biased("bias", *_BIASES),
    choice("activation", "hidden_act", {"gelu_pytorch_tanh": "gelu_tanh"}),
    marks=TRTLLM_ROTARY,
    fixed=_SHAPE,
    constants={**OF_GPT, "gpt_variant": "starcoder2"},
)

COLUMNS = {
    "megatron": Column(rules=naming.MEGATRON, dialects=(MEGATRON,), tied_copy="output_layer.weight"),
    "huggingface": Column(
        rules=(
            *naming.HUGGINGFACE_ENDS,
            *naming.HUGGINGFACE_ATTENTION,
            *naming.HUGGINGFACE_NORMS,
            *naming.layer(naming.HUGGINGFACE_LAYER, {"mlp.c_fc.*": "ffn.up.*", "mlp.c_proj.*": "ffn.down.*"}),
        ),
        dialects=(HUGGINGFACE,),
        tied_copy="lm_head.weight",
    ),
    "trtllm": Column(rules=(*naming.TRTLLM, *naming.trtllm_norms(naming.TRTLLM_NORMS)), dialects=(TRTLLM,)),
}
