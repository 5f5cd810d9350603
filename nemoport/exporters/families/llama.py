"""Llama 2, 3 and 3.x, and what differs from them by a flag: Mistral (sliding window), Qwen2 (bias on q, k, v), Qwen3
(norm on q and k).

RMSNorm before attention and feed-forward, rotary positions, grouped-query attention, gated SiLU.
"""

from __future__ import annotations

from nemoport.exporters import naming
from nemoport.exporters.configs import AnyOf, Dialect, Key, Mark, Row, flag, whole_number
from nemoport.exporters.dialects.huggingface import HUGGINGFACE_ROPE, RMS_EPS, huggingface, huggingface_sizes
from nemoport.exporters.dialects.megatron import (
    GATED,
    MEGATRON_ROPE,
    MEGATRON_SCALE,
    MEGATRON_WINDOW,
    ONE_WINDOW,
    RMS,
    ROTARY,
    WHOLE_HEADS,
    centered,
    megatron,
)
from nemoport.exporters.dialects.rows import Marks, biased
from nemoport.exporters.dialects.trtllm import (
    OF_LLAMA,
    OF_LLAMA_AND_QWEN,
    TRTLLM_ROPE,
    TRTLLM_ROTARY,
    no_experts,
    trtllm,
)
from nemoport.exporters.rules import Column

MEGATRON = megatron(
    *MEGATRON_ROPE,
    *MEGATRON_WINDOW,
    *MEGATRON_SCALE,
    Key("qk_norm", "qk_layernorm", False, flag),
    marks=(
        *RMS,
        *GATED,
        Mark("activation_func", "silu", absent="gelu"),
        *ROTARY,
        *WHOLE_HEADS,
        *ONE_WINDOW,
        *centered(False),
    ),
    fixed={},
)

_SILU = (Mark("hidden_act", "silu", absent="silu"), Mark("is_causal", AnyOf((None, True))))
_NO_WINDOW = (Mark("use_sliding_window", False, absent=False),)
_ATTENTION_BIAS = biased("attention_bias", "qkv_bias", "out_bias")


def _huggingface(
    model_type: str, architecture: str, *rows: Row, marks: Marks = (), fixed: dict[str, bool] | None = None
) -> Dialect:
    sizes = huggingface_sizes(RMS_EPS)
    return huggingface(model_type, architecture, *sizes, *HUGGINGFACE_ROPE, *rows, marks=(*_SILU, *marks), fixed=fixed)


HUGGINGFACE = (
    _huggingface("llama", "LlamaForCausalLM", *_ATTENTION_BIAS, Key("ffn_bias", "mlp_bias", False, flag)),
    _huggingface("mistral", "MistralForCausalLM", Key("window", "sliding_window", None, whole_number)),
    _huggingface("qwen2", "Qwen2ForCausalLM", marks=_NO_WINDOW, fixed={"qkv_bias": True}),
    _huggingface("qwen3", "Qwen3ForCausalLM", *_ATTENTION_BIAS, marks=_NO_WINDOW, fixed={"qk_norm": True}),
)

_TRTLLM = (Mark("hidden_act", "silu"), *TRTLLM_ROTARY)
TRTLLM = (
    trtllm(
        "LlamaForCausalLM",
        *TRTLLM_ROPE,
        *biased("attn_bias", "qkv_bias", "out_bias"),
        *biased("mlp_bias", "ffn_bias"),
        marks=_TRTLLM,
        constants=OF_LLAMA | {"moe": no_experts(None)},
    ),
    trtllm(
        "Qwen2ForCausalLM",
        *TRTLLM_ROPE,
        marks=_TRTLLM,
        fixed={"qkv_bias": True},
        constants=OF_LLAMA_AND_QWEN
        | {"moe": no_experts(None), "qwen_type": "qwen2", "attn_bias": True, "mlp_bias": False},
    ),
)

COLUMNS = {
    "megatron": Column(rules=naming.MEGATRON_GATED, dialects=(MEGATRON,), tied_copy="output_layer.weight"),
    "huggingface": Column(rules=naming.HUGGINGFACE, dialects=HUGGINGFACE, tied_copy="lm_head.weight"),
    "trtllm": Column(rules=(*naming.TRTLLM_GATED, *naming.trtllm_norms(naming.TRTLLM_NORMS)), dialects=TRTLLM),
}
