"""Names that families share, as rows. `*` stands for `weight` and for `bias`: a rule applies where the model has it.

layer("model.layers.{i}.", {"self_attn.q_proj.*": "attn.q.*"})
"""

from __future__ import annotations

from collections.abc import Mapping

from nemoport.exporters.layouts import PADDED, QUERY_GROUPS, STACKED, WHOLE, Layout
from nemoport.exporters.rules import Rule

LAYER = "layers.{i}."
QKV = ("attn.q.*", "attn.k.*", "attn.v.*")
GATE_UP = ("ffn.gate.*", "ffn.up.*")

Parts = str | tuple[str, ...]


def rules(names: Mapping[str, Parts], layout: Layout = WHOLE) -> tuple[Rule, ...]:
    """Stored name -> the canonical name, or the several, inside it."""
    return tuple(
        Rule(stored.replace("*", kind), tuple(part.replace("*", kind) for part in _several(parts)), layout)
        for stored, parts in names.items()
        for kind in (("weight", "bias") if "*" in stored else ("",))
    )


def layer(prefix: str, names: Mapping[str, Parts], layout: Layout = WHOLE) -> tuple[Rule, ...]:
    """`rules` below one layer, stored names below `prefix`."""
    return rules(
        {prefix + stored: tuple(LAYER + part for part in _several(parts)) for stored, parts in names.items()}, layout
    )


def _several(parts: Parts) -> tuple[str, ...]:
    return (parts,) if isinstance(parts, str) else parts


_MEGATRON = "decoder.layers.{i}."
_MEGATRON_SHARED = (
    *rules({"embedding.word_embeddings.weight": "embed.weight"}, PADDED),
    *rules({"embedding.position_embeddings.weight": "positions.weight", "decoder.final_layernorm.*": "norm.*"}),
    *rules({"output_layer.weight": "head.weight"}, PADDED),
    *layer(_MEGATRON, {"self_attention.linear_qkv.*": QKV}, QUERY_GROUPS),
    *layer(
        _MEGATRON,
        {
            "self_attention.linear_qkv.layer_norm_*": "attn_norm.*",
            "input_layernorm.*": "attn_norm.*",
            "self_attention.q_layernorm.weight": "attn.q_norm.weight",
            "self_attention.k_layernorm.weight": "attn.k_norm.weight",
            "self_attention.linear_proj.*": "attn.o.*",
            "self_attention.linear_proj.post_layernorm.weight": "attn_post_norm.weight",
            "mlp.linear_fc1.layer_norm_*": "ffn_norm.*",
            "pre_mlp_layernorm.*": "ffn_norm.*",
            "mlp.linear_fc2.*": "ffn.down.*",
            "mlp.linear_fc2.post_layernorm.weight": "ffn_post_norm.weight",
        },
    ),
)
MEGATRON_GATED = (
    *_MEGATRON_SHARED,
    *layer(_MEGATRON, {"mlp.linear_fc1.*": GATE_UP}, STACKED),
    # Megatron's FSDP stores the halves apart.
    *layer(_MEGATRON, {"mlp.linear_fc1.*_w": "ffn.gate.*", "mlp.linear_fc1.*_v": "ffn.up.*"}),
)
MEGATRON = (*_MEGATRON_SHARED, *layer(_MEGATRON, {"mlp.linear_fc1.*": "ffn.up.*"}))
"""Not gated: fc1 is the up-projection alone."""

HUGGINGFACE_LAYER = "model.layers.{i}."
HUGGINGFACE_ENDS = (
    *rules({"model.embed_tokens.weight": "embed.weight"}, PADDED),
    *rules({"model.norm.*": "norm.*"}),
    *rules({"lm_head.weight": "head.weight"}, PADDED),
)
HUGGINGFACE_ATTENTION = layer(
    HUGGINGFACE_LAYER,
    {
        "self_attn.q_proj.*": "attn.q.*",
        "self_attn.k_proj.*": "attn.k.*",
        "self_attn.v_proj.*": "attn.v.*",
        "self_attn.o_proj.*": "attn.o.*",
        "self_attn.q_norm.weight": "attn.q_norm.weight",
        "self_attn.k_norm.weight": "attn.k_norm.weight",
    },
)
HUGGINGFACE_NORMS = layer(
    HUGGINGFACE_LAYER, {"input_layernorm.*": "attn_norm.*", "post_attention_layernorm.*": "ffn_norm.*"}
)
HUGGINGFACE_FFN = layer(
    HUGGINGFACE_LAYER,
    {"mlp.gate_proj.*": "ffn.gate.*", "mlp.up_proj.*": "ffn.up.*", "mlp.down_proj.*": "ffn.down.*"},
)
HUGGINGFACE = (*HUGGINGFACE_ENDS, *HUGGINGFACE_ATTENTION, *HUGGINGFACE_NORMS, *HUGGINGFACE_FFN)

TRTLLM_LAYER = "transformer.layers.{i}."
_TRTLLM_SHARED = (
    *rules(
        {
            "transformer.vocab_embedding.weight": "embed.weight",
            "transformer.position_embedding.weight": "positions.weight",
            "lm_head.weight": "head.weight",
        }
    ),
    *layer(TRTLLM_LAYER, {"attention.qkv.*": QKV}, STACKED),
    *layer(TRTLLM_LAYER, {"attention.dense.*": "attn.o.*", "mlp.proj.*": "ffn.down.*"}),
)
TRTLLM_GATED = (*_TRTLLM_SHARED, *layer(TRTLLM_LAYER, {"mlp.fc.*": "ffn.gate.*", "mlp.gate.*": "ffn.up.*"}))
"""fc is the gate and gate is the up-projection there."""
TRTLLM = (*_TRTLLM_SHARED, *layer(TRTLLM_LAYER, {"mlp.fc.*": "ffn.up.*"}))


def trtllm_norms(names: Mapping[str, str], layout: Layout = WHOLE) -> tuple[Rule, ...]:
    """The norms of TensorRT-LLM's layers and the last one, their weights in a layout of their own."""
    stored = {f"{TRTLLM_LAYER}{name}": LAYER + part for name, part in names.items()} | {"transformer.ln_f": "norm"}
    return (
        *rules({f"{name}.weight": f"{part}.weight" for name, part in stored.items()}, layout),
        *rules({f"{name}.bias": f"{part}.bias" for name, part in stored.items()}),
    )


TRTLLM_NORMS = {"input_layernorm": "attn_norm", "post_layernorm": "ffn_norm"}
