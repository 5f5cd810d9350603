"""Names that families share, as rows. `*` stands for `weight` and for `bias`: a rule applies where the model has it.

layer("model.layers.{i}.", {"self_attn.q_proj.*": "attn.q.*"})
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from nemoport.exporters.layouts import (
    EXPERTS,
    EXPERTS_STACKED,
    PADDED,
    QUERY_GROUPS,
    STACKED,
    WHOLE,
    Layout,
)
from nemoport.exporters.rules import Rule

LAYER = "layers.{i}."
QKV = ("attn.q.*", "attn.k.*", "attn.v.*")
GATE_UP = ("ffn.gate.*", "ffn.up.*")
EACH, EVERY = "ffn.experts.{e}.", "ffn.experts.{every}."
GATE_UP_OF_EACH = (EACH + "gate.*", EACH + "up.*")
GATE_UP_OF_EVERY = (EVERY + "gate.*", EVERY + "up.*")
LATENT_AND_KEY = ("attn.kv_down.weight", "attn.k_rope.weight")
KEYS_AND_VALUES = ("attn.k_up.weight", "attn.v_up.weight")
"""Of latent attention: [latent; key], and for each head its key and its value."""

Parts = str | tuple[str, ...]


def rules(names: Mapping[str, Parts], layout: Layout = WHOLE, dtype: str = "") -> tuple[Rule, ...]:
    """Stored name -> the canonical name, or the several, inside it."""
    return tuple(
        Rule(stored.replace("*", kind), tuple(part.replace("*", kind) for part in _several(parts)), layout, dtype)
        for stored, parts in names.items()
        for kind in (("weight", "bias") if "*" in stored else ("",))
    )


def layer(prefix: str, names: Mapping[str, Parts], layout: Layout = WHOLE, dtype: str = "") -> tuple[Rule, ...]:
    """`rules` below one layer, stored names below `prefix`."""
    below = {prefix + stored: tuple(LAYER + part for part in _several(parts)) for stored, parts in names.items()}
    return rules(below, layout, dtype)


def bare(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Hugging Face's names in a model without a head, which has no `model.` around it."""
    return tuple(replace(rule, stored=rule.stored.removeprefix("model.")) for rule in headless(rules))


def headless(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Without the matrix that writes text."""
    return tuple(rule for rule in rules if rule.parts != ("head.weight",))


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
            "self_attention.core_attention.softmax_offset": "attn.sinks",
            "self_attention.linear_proj.*": "attn.o.*",
            "self_attention.linear_proj.post_layernorm.weight": "attn_post_norm.weight",
            "mlp.linear_fc1.layer_norm_*": "ffn_norm.*",
            "pre_mlp_layernorm.*": "ffn_norm.*",
            "mlp.linear_fc2.*": "ffn.down.*",
            "mlp.linear_fc2.post_layernorm.weight": "ffn_post_norm.weight",
        },
    ),
)
MEGATRON_LATENT = (
    *layer(
        _MEGATRON,
        {
            "self_attention.linear_q_proj.weight": "attn.q.weight",
            "self_attention.linear_q_down_proj.weight": "attn.q_down.weight",
            "self_attention.linear_q_up_proj.layer_norm_weight": "attn.q_norm.weight",
            "self_attention.linear_q_up_proj.weight": "attn.q_up.weight",
            "self_attention.linear_kv_up_proj.layer_norm_weight": "attn.kv_norm.weight",
            "self_attention.kv_layernorm.weight": "attn.kv_norm.weight",
        },
    ),
    *layer(_MEGATRON, {"self_attention.linear_kv_down_proj.weight": LATENT_AND_KEY}, STACKED),
    *layer(_MEGATRON, {"self_attention.linear_kv_up_proj.weight": KEYS_AND_VALUES}, QUERY_GROUPS),
)
MEGATRON_GATED = (
    *_MEGATRON_SHARED,
    *layer(_MEGATRON, {"mlp.linear_fc1.*": GATE_UP}, STACKED),
    # Megatron's FSDP stores the halves apart.
    *layer(_MEGATRON, {"mlp.linear_fc1.*_w": "ffn.gate.*", "mlp.linear_fc1.*_v": "ffn.up.*"}),
)
MEGATRON_EXPERTS = (
    *layer(
        _MEGATRON,
        {
            "mlp.router.*": "ffn.router.*",
            "mlp.router.expert_bias": "ffn.router.expert_bias",
            "mlp.shared_experts.linear_fc2.*": "ffn.shared.down.*",
            "mlp.shared_experts.gate_weight": "ffn.shared_gate.weight",
        },
    ),
    *layer(_MEGATRON, {"mlp.shared_experts.linear_fc1.*": ("ffn.shared.gate.*", "ffn.shared.up.*")}, STACKED),
    # Distributed checkpoints: whatever module and parallel layout wrote them.
    *layer(_MEGATRON, {"mlp.experts.experts.linear_fc1.*": GATE_UP_OF_EVERY}, EXPERTS_STACKED),
    *layer(_MEGATRON, {"mlp.experts.experts.linear_fc2.*": EVERY + "down.*"}, EXPERTS),
    # Modules: SequentialMLP, TEGroupedMLP.
    *layer(_MEGATRON, {"mlp.experts.local_experts.{e}.linear_fc1.*": GATE_UP_OF_EACH}, STACKED),
    *layer(_MEGATRON, {"mlp.experts.local_experts.{e}.linear_fc2.*": EACH + "down.*"}),
    *layer(_MEGATRON, {"mlp.experts.linear_fc1.*{e}": GATE_UP_OF_EACH}, STACKED),
    *layer(_MEGATRON, {"mlp.experts.linear_fc2.*{e}": EACH + "down.*"}),
)
"""Beside MEGATRON_GATED: a model may have dense layers too (megatron/core/transformer/moe/experts.py)."""
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
HUGGINGFACE_LATENT = (
    *layer(
        HUGGINGFACE_LAYER,
        {
            "self_attn.q_proj.weight": "attn.q.weight",
            "self_attn.q_a_proj.weight": "attn.q_down.weight",
            "self_attn.q_a_layernorm.weight": "attn.q_norm.weight",
            "self_attn.q_b_proj.weight": "attn.q_up.weight",
            "self_attn.kv_a_layernorm.weight": "attn.kv_norm.weight",
            "self_attn.o_proj.weight": "attn.o.weight",
        },
    ),
    *layer(HUGGINGFACE_LAYER, {"self_attn.kv_a_proj_with_mqa.weight": LATENT_AND_KEY}, STACKED),
    *layer(HUGGINGFACE_LAYER, {"self_attn.kv_b_proj.weight": KEYS_AND_VALUES}, QUERY_GROUPS),
)
HUGGINGFACE_NORMS = layer(
    HUGGINGFACE_LAYER, {"input_layernorm.*": "attn_norm.*", "post_attention_layernorm.*": "ffn_norm.*"}
)
HUGGINGFACE_FFN = layer(
    HUGGINGFACE_LAYER,
    {"mlp.gate_proj.*": "ffn.gate.*", "mlp.up_proj.*": "ffn.up.*", "mlp.down_proj.*": "ffn.down.*"},
)
HUGGINGFACE_EXPERTS = (
    *layer(
        HUGGINGFACE_LAYER,
        {
            "mlp.gate.weight": "ffn.router.weight",
            "mlp.experts.{e}.gate_proj.weight": EACH + "gate.weight",
            "mlp.experts.{e}.up_proj.weight": EACH + "up.weight",
            "mlp.experts.{e}.down_proj.weight": EACH + "down.weight",
        },
    ),
)
"""Those of Qwen and DeepSeek."""
HUGGINGFACE_STACKED_EXPERTS = (
    *layer(
        HUGGINGFACE_LAYER,
        {"mlp.experts.gate_up_proj": (EVERY + "gate.weight", EVERY + "up.weight")},
        EXPERTS_STACKED,
    ),
    *layer(HUGGINGFACE_LAYER, {"mlp.experts.down_proj": EVERY + "down.weight"}, EXPERTS),
)
"""As transformers 5 holds them in memory, and saves them if told to leave its names alone."""
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
    *layer(TRTLLM_LAYER, {"attention.dense.*": "attn.o.*"}),
)
TRTLLM_GATED = (
    *_TRTLLM_SHARED,
    *layer(TRTLLM_LAYER, {"mlp.fc.*": "ffn.gate.*", "mlp.gate.*": "ffn.up.*", "mlp.proj.*": "ffn.down.*"}),
)
"""fc is the gate and gate is the up-projection there."""
TRTLLM_EXPERTS = (
    *_TRTLLM_SHARED,
    *layer(TRTLLM_LAYER, {"mlp.router.weight": "ffn.router.weight"}, dtype="float32"),
    *layer(TRTLLM_LAYER, {"mlp.fc.weight": (EVERY + "up.weight", EVERY + "gate.weight")}, EXPERTS_STACKED),
    *layer(TRTLLM_LAYER, {"mlp.proj.weight": EVERY + "down.weight"}, EXPERTS),
)
"""Each rank's experts in one tensor, up before gate."""
TRTLLM = (*_TRTLLM_SHARED, *layer(TRTLLM_LAYER, {"mlp.fc.*": "ffn.up.*", "mlp.proj.*": "ffn.down.*"}))


def trtllm_norms(names: Mapping[str, str], layout: Layout = WHOLE) -> tuple[Rule, ...]:
    """The norms of TensorRT-LLM's layers and the last one, their weights in a layout of their own."""
    stored = {f"{TRTLLM_LAYER}{name}": LAYER + part for name, part in names.items()} | {"transformer.ln_f": "norm"}
    return (
        *rules({f"{name}.weight": f"{part}.weight" for name, part in stored.items()}, layout),
        *rules({f"{name}.bias": f"{part}.bias" for name, part in stored.items()}),
    )


TRTLLM_NORMS = {"input_layernorm": "attn_norm", "post_layernorm": "ffn_norm"}
