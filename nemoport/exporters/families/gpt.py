"""GPT-2 and what Megatron trains by default: learned positions, LayerNorm, biases, GELU, exact or approximated.

Hugging Face names are GPT-2's, whose matrices are [in, out] (`Conv1D`) with q, k and v side by side.
"""

from __future__ import annotations

from nemoport.exporters import naming
from nemoport.exporters.configs import AnyOf, Key, Keys, Mark, choice, flag, layers, number, whole_number
from nemoport.exporters.dialects.huggingface import HUGGINGFACE_ACTIVATIONS, huggingface
from nemoport.exporters.dialects.megatron import (
    LAYER_NORM,
    MEGATRON_GELU,
    MEGATRON_SCALE,
    TANH,
    UNGATED,
    centered,
    megatron,
)
from nemoport.exporters.dialects.rows import biased
from nemoport.exporters.dialects.trtllm import OF_GPT, TRTLLM_GELU, trtllm
from nemoport.exporters.layouts import PADDED, STACKED, TRANSPOSED
from nemoport.exporters.rules import Column, Rule

_SHAPE = {"norm": "layer", "gated": False, "learned_positions": True}
_BIASED = {"qkv_bias": True, "out_bias": True, "ffn_bias": True}
_LEARNED = Mark("position_embedding_type", "learned_absolute", absent="learned_absolute")

MEGATRON = megatron(
    MEGATRON_GELU,
    *MEGATRON_SCALE,
    marks=(
        *LAYER_NORM,
        *UNGATED,
        Mark("activation_func", AnyOf(("gelu", *TANH)), absent="gelu"),
        _LEARNED,
        *centered(False),
        Mark("window_size", None),
        Mark("qk_layernorm", False, absent=False),
    ),
    fixed=_SHAPE,
)

_GELU = {name: ours for name, ours in HUGGINGFACE_ACTIVATIONS.items() if "gelu" in name}
HUGGINGFACE = huggingface(
    "gpt2",
    "GPT2LMHeadModel",
    Key("vocab_size", "vocab_size", into=whole_number),
    Key("hidden_size", "n_embd", into=whole_number),
    Key("max_positions", "n_positions", 1024, whole_number),
    Key("layers", "n_layer", into=layers),
    Key("eps", "layer_norm_epsilon", 1e-5, number),
    Key("tied", "tie_word_embeddings", True, flag),
    Key("heads", "n_head", into=whole_number),
    Keys("kv_heads", lambda config: config["n_head"], lambda heads: {}),
    Keys("head_dim", lambda config: config["n_embd"] // config["n_head"], lambda size: {}),
    Key("intermediate", "n_inner", lambda words: 4 * words["hidden_size"], whole_number),
    choice("activation", "activation_function", {"gelu_new": "gelu_tanh"} | _GELU, "gelu_tanh"),
    marks=(
        Mark("scale_attn_weights", True, absent=True),
        Mark("scale_attn_by_inverse_layer_idx", False, absent=False),
        Mark("add_cross_attention", False, absent=False),
    ),
    fixed=_SHAPE | _BIASED,
)

TRTLLM = trtllm(
    "GPT2LMHeadModel",
    *biased("bias", "qkv_bias", "out_bias", "ffn_bias"),
    TRTLLM_GELU,
    marks=(Mark("position_embedding_type", "learned_absolute"),),
    fixed=_SHAPE,
    constants={**OF_GPT, "gpt_variant": "gpt2", "rotary_pct": 1.0, "rotary_base": 10000.0, "rotary_scaling": None},
)


def _huggingface(prefix: str) -> tuple[Rule, ...]:
    """OpenAI's own checkpoints have no prefix."""
    block = f"{prefix}h.{{i}}."
    return (
        *naming.rules({f"{prefix}wte.weight": "embed.weight"}, PADDED),
        *naming.rules({f"{prefix}wpe.weight": "positions.weight", f"{prefix}ln_f.*": "norm.*"}),
        *naming.layer(block, {"ln_1.*": "attn_norm.*", "ln_2.*": "ffn_norm.*"}),
        *naming.layer(
            block,
            {
                "attn.c_attn.weight": tuple(part.replace("*", "weight") for part in naming.QKV),
                "attn.c_proj.weight": "attn.o.weight",
                "mlp.c_fc.weight": "ffn.up.weight",
                "mlp.c_proj.weight": "ffn.down.weight",
            },
            TRANSPOSED,
        ),
        *naming.layer(block, {"attn.c_attn.bias": tuple(part.replace("*", "bias") for part in naming.QKV)}, STACKED),
        *naming.layer(
            block,
            {
                "attn.c_proj.bias": "attn.o.bias",
                "mlp.c_fc.bias": "ffn.up.bias",
                "mlp.c_proj.bias": "ffn.down.bias",
            },
        ),
    )


COLUMNS = {
    "megatron": Column(rules=naming.MEGATRON, dialects=(MEGATRON,), tied_copy="output_layer.weight"),
    "huggingface": Column(
        rules=(
            *_huggingface("transformer."),
            *_huggingface(""),
            *naming.rules({"lm_head.weight": "head.weight"}, PADDED),
        ),
        dialects=(HUGGINGFACE,),
        tied_copy="lm_head.weight",
        buffers={"*h.*.attn.bias": "causal mask", "*h.*.attn.masked_bias": "causal mask"},
    ),
    "trtllm": Column(rules=(*naming.TRTLLM, *naming.trtllm_norms(naming.TRTLLM_NORMS)), dialects=(TRTLLM,)),
}
