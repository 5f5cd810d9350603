"""Mixtral, and what Megatron-core trains like it: Llama with a mixture of experts in the place of the feed-forward.

The Megatron column says every router that Megatron-core has, the other two Mixtral's own: a softmax over the chosen.
"""

from __future__ import annotations

from nemoport.exporters import naming
from nemoport.exporters.configs import Key, Mark, whole_number
from nemoport.exporters.dialects.huggingface import HUGGINGFACE_ROPE, RMS_EPS, experts, huggingface, huggingface_sizes
from nemoport.exporters.dialects.megatron import (
    GATED,
    MEGATRON_EXPERTS,
    MEGATRON_ROPE,
    MEGATRON_SCALE,
    MEGATRON_WINDOW,
    NO_SINKS,
    ONE_WINDOW,
    RMS,
    ROTARY,
    WHOLE_HEADS,
    WITH_EXPERTS,
    centered,
    megatron,
)
from nemoport.exporters.dialects.rows import biased
from nemoport.exporters.dialects.trtllm import OF_LLAMA, TRTLLM_EXPERTS, TRTLLM_ROPE, TRTLLM_ROTARY, trtllm
from nemoport.exporters.rules import Column

MEGATRON = megatron(
    *MEGATRON_ROPE,
    *MEGATRON_WINDOW,
    *MEGATRON_SCALE,
    *MEGATRON_EXPERTS,
    marks=(
        *WITH_EXPERTS,
        *RMS,
        *GATED,
        Mark("activation_func", "silu", absent="gelu"),
        *NO_SINKS,
        Mark("qk_layernorm", False, absent=False),
        Mark("moe_shared_expert_gate", False, absent=False),
        *ROTARY,
        *WHOLE_HEADS,
        *ONE_WINDOW,
        *centered(False),
    ),
    fixed={},
)

HUGGINGFACE = huggingface(
    "mixtral",
    "MixtralForCausalLM",
    *huggingface_sizes(RMS_EPS),
    *HUGGINGFACE_ROPE,
    *experts("num_local_experts", "intermediate_size"),
    Key("window", "sliding_window", None, whole_number),
    marks=(Mark("hidden_act", "silu", absent="silu"),),
    fixed={"ffn": "mixture"},
)
_HUGGINGFACE_EXPERTS = naming.layer(
    naming.HUGGINGFACE_LAYER,
    {
        "block_sparse_moe.gate.weight": "ffn.router.weight",
        "block_sparse_moe.experts.{e}.w1.weight": naming.EACH + "gate.weight",
        "block_sparse_moe.experts.{e}.w3.weight": naming.EACH + "up.weight",
        "block_sparse_moe.experts.{e}.w2.weight": naming.EACH + "down.weight",
        "mlp.gate.weight": "ffn.router.weight",
    },
)

TRTLLM = trtllm(
    "MixtralForCausalLM",
    *TRTLLM_ROPE,
    *biased("attn_bias", "qkv_bias", "out_bias"),
    *TRTLLM_EXPERTS,
    marks=(Mark("hidden_act", "swiglu"), *TRTLLM_ROTARY),
    fixed={"ffn": "mixture"},
    constants=OF_LLAMA | {"mlp_bias": False},
)

COLUMNS = {
    "megatron": Column(
        rules=(*naming.MEGATRON_GATED, *naming.MEGATRON_EXPERTS),
        dialects=(MEGATRON,),
        tied_copy="output_layer.weight",
    ),
    "huggingface": Column(
        rules=(
            *naming.HUGGINGFACE_ENDS,
            *naming.HUGGINGFACE_ATTENTION,
            *naming.HUGGINGFACE_NORMS,
            *_HUGGINGFACE_EXPERTS,
            *naming.HUGGINGFACE_STACKED_EXPERTS,
        ),
        dialects=(HUGGINGFACE,),
        tied_copy="lm_head.weight",
    ),
    "trtllm": Column(rules=(*naming.TRTLLM_EXPERTS, *naming.trtllm_norms(naming.TRTLLM_NORMS)), dialects=(TRTLLM,)),
}
