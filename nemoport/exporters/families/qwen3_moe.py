"""Qwen3-MoE (norm on q and k) and Qwen2-MoE (bias on q, k, v, and an expert that sees every token, gated); both may
have dense layers among those of experts."""

from __future__ import annotations

from typing import Any

from nemoport.exporters import naming
from nemoport.exporters.configs import Config, Dialect, Key, Mark, Row, Together, flag, layers, whole_number
from nemoport.exporters.dialects.huggingface import HUGGINGFACE_ROPE, RMS_EPS, experts, huggingface, huggingface_sizes
from nemoport.exporters.dialects.megatron import (
    GATED,
    MEGATRON_EXPERTS,
    MEGATRON_ROPE,
    MEGATRON_SCALE,
    NO_SINKS,
    RMS,
    ROTARY,
    WHOLE_HEADS,
    WITH_EXPERTS,
    centered,
    megatron,
)
from nemoport.exporters.dialects.rows import Marks, biased, without
from nemoport.exporters.rules import Column
from nemoport.exporters.words import Words, by_layer, collapsed


def _megatron(*marks: Mark, fixed: Words) -> Dialect:
    return megatron(
        *MEGATRON_ROPE,
        *MEGATRON_SCALE,
        *MEGATRON_EXPERTS,
        marks=(
            *WITH_EXPERTS,
            *marks,
            *NO_SINKS,
            *RMS,
            *GATED,
            Mark("activation_func", "silu", absent="gelu"),
            *ROTARY,
            *WHOLE_HEADS,
            Mark("window_size", None),
            *centered(False),
        ),
        fixed=fixed,
    )


MEGATRON = (
    _megatron(Mark("qk_layernorm", True, absent=False), fixed={"qk_norm": True}),
    _megatron(Mark("qk_layernorm", False, absent=False), Mark("moe_shared_expert_gate", True, absent=False), fixed={}),
)


def _kinds(config: Config) -> Words:
    """Every `decoder_sparse_step`th layer has experts, but for those of `mlp_only_layers`; the size of the others
    counts if there are any."""
    count, step = layers(config["num_hidden_layers"]), whole_number(config.get("decoder_sparse_step") or 1)
    dense = set(config.get("mlp_only_layers") or ())
    has = [layer not in dense and (layer + 1) % step == 0 for layer in range(count)]
    width = {} if all(has) else {"intermediate": whole_number(config["intermediate_size"])}
    return {"ffn": collapsed(["mixture" if each else "dense" for each in has]), **width}


def _to_kinds(words: Words) -> dict[str, Any]:
    dense = [layer for layer, kind in enumerate(by_layer(words, "ffn")) if kind == "dense"]
    width = {"intermediate_size": words["intermediate"]} if dense else {}
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense, **width}


_FFN = Together(("ffn", "intermediate"), _kinds, _to_kinds)


def _huggingface(model_type: str, architecture: str, *rows: Row, marks: Marks = (), fixed: Words) -> Dialect:
    return huggingface(
        model_type,
        architecture,
        *without(huggingface_sizes(RMS_EPS), (_FFN,)),
        *HUGGINGFACE_ROPE,
        _FFN,
        *experts("num_experts", "moe_intermediate_size"),
        Key("router_normalized", "norm_topk_prob", False, flag),
        *rows,
        marks=(
            Mark("hidden_act", "silu", absent="silu"),
            Mark("use_sliding_window", False, absent=False),
            *marks,
        ),
        fixed=fixed,
    )


HUGGINGFACE = (
    _huggingface(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        *biased("attention_bias", "qkv_bias", "out_bias"),
        fixed={"qk_norm": True},
    ),
    _huggingface(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        Key("qkv_bias", "qkv_bias", True, flag),
        Key("shared_intermediate", "shared_expert_intermediate_size", into=whole_number),
        fixed={"shared_gate": True},
    ),
)
_SHARED = naming.layer(
    naming.HUGGINGFACE_LAYER,
    {
        "mlp.shared_expert.gate_proj.weight": "ffn.shared.gate.weight",
        "mlp.shared_expert.up_proj.weight": "ffn.shared.up.weight",
        "mlp.shared_expert.down_proj.weight": "ffn.shared.down.weight",
        "mlp.shared_expert_gate.weight": "ffn.shared_gate.weight",
    },
)

COLUMNS = {
    "megatron": Column(
        rules=(*naming.MEGATRON_GATED, *naming.MEGATRON_EXPERTS), dialects=MEGATRON, tied_copy="output_layer.weight"
    ),
    "huggingface": Column(
        rules=(
            *naming.HUGGINGFACE,
            *naming.HUGGINGFACE_EXPERTS,
            *naming.HUGGINGFACE_STACKED_EXPERTS,
            *_SHARED,
        ),
        dialects=HUGGINGFACE,
        tied_copy="lm_head.weight",
    ),
}
