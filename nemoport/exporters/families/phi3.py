"""Phi-3 and Phi-4 mini: Llama with q, k and v in one matrix and gate and up in another. From Megatron it is a Llama."""

from __future__ import annotations

from nemoport.exporters import naming
from nemoport.exporters.configs import Key, Mark, number, whole_number
from nemoport.exporters.dialects.huggingface import (
    HUGGINGFACE_ROPE,
    UNSAID,
    huggingface,
    huggingface_fraction,
    huggingface_sizes,
)
from nemoport.exporters.layouts import STACKED
from nemoport.exporters.rules import Column

HUGGINGFACE = huggingface(
    "phi3",
    "Phi3ForCausalLM",
    *huggingface_sizes(Key("eps", "rms_norm_eps", 1e-5, number), head_dim=UNSAID, positions=4096),
    *HUGGINGFACE_ROPE,
    huggingface_fraction(1.0),
    Key("window", "sliding_window", None, whole_number),
    marks=(Mark("hidden_act", "silu", absent="silu"),),
)
_FUSED = {
    "self_attn.qkv_proj.weight": tuple(part.replace("*", "weight") for part in naming.QKV),
    "mlp.gate_up_proj.weight": tuple(part.replace("*", "weight") for part in naming.GATE_UP),
}

COLUMNS = {
    "huggingface": Column(
        rules=(
            *naming.HUGGINGFACE_ENDS,
            *naming.layer(naming.HUGGINGFACE_LAYER, _FUSED, STACKED),
            *naming.layer(
                naming.HUGGINGFACE_LAYER,
                {"self_attn.o_proj.weight": "attn.o.weight", "mlp.down_proj.weight": "ffn.down.weight"},
            ),
            *naming.HUGGINGFACE_NORMS,
        ),
        dialects=(HUGGINGFACE,),
        tied_copy="lm_head.weight",
    ),
}
