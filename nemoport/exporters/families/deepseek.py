"""DeepSeek V2 and V3, Moonlight, Kimi K2: latent attention, dense first layers, a mixture of many small experts in the
others.

Layers that predict further tokens (`num_nextn_predict_layers`, `mtp_num_layers`) are not part of the model and are left
out, as transformers leaves them out.
"""

from __future__ import annotations

from typing import Any

from nemoport.exporters import naming
from nemoport.exporters.configs import (
    Config,
    Dialect,
    Key,
    Mark,
    Row,
    Together,
    flag,
    layers,
    number,
    whole_number,
)
from nemoport.exporters.dialects.huggingface import RMS_EPS, expert_groups, experts, huggingface, huggingface_sizes
from nemoport.exporters.dialects.latent import (
    FIXED,
    HUGGINGFACE_LATENT,
    INTERLEAVED,
    MEGATRON_LATENT,
    OF_LATENT,
)
from nemoport.exporters.dialects.megatron import (
    GATED,
    MEGATRON_EXPERTS,
    ROTARY,
    WHOLE_HEADS,
    WITH_EXPERTS,
    centered,
    megatron,
)
from nemoport.exporters.dialects.rows import Marks, without
from nemoport.exporters.rules import Column
from nemoport.exporters.words import Words, by_layer, collapsed

_MEGATRON = (
    *OF_LATENT,
    Mark("normalization", "RMSNorm", absent="RMSNorm"),
    *GATED,
    Mark("activation_func", "silu", absent="gelu"),
    *ROTARY,
    *WHOLE_HEADS,
    *centered(False),
    Mark("add_bias_linear", False, absent=True),
)
MEGATRON = (
    megatron(
        *MEGATRON_LATENT,
        *MEGATRON_EXPERTS,
        marks=(*_MEGATRON, *WITH_EXPERTS, Mark("moe_shared_expert_gate", False, absent=False)),
        fixed=FIXED,
    ),
    megatron(*MEGATRON_LATENT, marks=_MEGATRON, fixed=FIXED),
)


def _dense_first(absent: int) -> Together:
    """The first layers have no experts."""

    def of(config: Config) -> Words:
        first, count = config.get("first_k_dense_replace", absent), layers(config["num_hidden_layers"])
        return {"ffn": collapsed(["dense" if layer < first else "mixture" for layer in range(count)])}

    def write(words: Words) -> dict[str, Any]:
        return {"first_k_dense_replace": by_layer(words, "ffn").count("dense")}

    return Together(("ffn",), of, write)


def _shared(config: Config) -> int | None:
    """One expert, as wide as several."""
    count = config.get("n_shared_experts") or 0
    return whole_number(count * config["moe_intermediate_size"]) if count else None


def _to_shared(words: Words) -> dict[str, Any]:
    shared, each = words.get("shared_intermediate"), words.get("expert_intermediate")
    return {"n_shared_experts": shared // each if shared and each else 0}


_WIDTH = Key("intermediate", "intermediate_size", 18432, whole_number)
_NO_EXPERTS = {"n_routed_experts": 1, "num_experts_per_tok": 1, "moe_intermediate_size": 1}
"""What a model of dense layers alone says, since the keys must be there."""


def _huggingface(model_type: str, architecture: str, *rows: Row, positions: int, marks: Marks, fixed: Words) -> Dialect:
    own = (*HUGGINGFACE_LATENT, _WIDTH)
    return huggingface(
        model_type,
        architecture,
        *own,
        *without(huggingface_sizes(RMS_EPS, positions=positions), own),
        *experts("n_routed_experts", "moe_intermediate_size"),
        Together(("shared_intermediate",), lambda config: {"shared_intermediate": _shared(config)}, _to_shared),
        *rows,
        marks=(
            Mark("hidden_act", "silu", absent="silu"),
            Mark("attention_bias", False, absent=False),
            Mark("moe_layer_freq", 1, absent=1),
            *marks,
        ),
        fixed=FIXED | fixed,
        constants=_NO_EXPERTS | {"num_nextn_predict_layers": 0},
    )


def _v3(model_type: str) -> Dialect:
    return _huggingface(
        model_type,
        "DeepseekV3ForCausalLM",
        INTERLEAVED,
        _dense_first(3),
        expert_groups(best=2),
        Key("router_normalized", "norm_topk_prob", True, flag),
        Key("router_scale", "routed_scaling_factor", 2.5, number),
        positions=4096,
        marks=(
            Mark("scoring_func", "sigmoid", absent="sigmoid"),
            Mark("topk_method", "noaux_tc", absent="noaux_tc"),
        ),
        fixed={"router_score": "sigmoid", "expert_bias": True},
    )


def _v2(topk_method: str, groups: Row | None) -> Dialect:
    return _huggingface(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        _dense_first(0),
        *((groups,) if groups else ()),
        Key("router_scale", "routed_scaling_factor", 1.0, number),
        positions=2048,
        marks=(
            Mark("mlp_bias", False, absent=False),
            Mark("scoring_func", "softmax", absent="softmax"),
            Mark("topk_method", topk_method, absent="greedy"),
            Mark("norm_topk_prob", False, absent=False),
        ),
        fixed={"router_normalized": False},
    )


HUGGINGFACE = (
    _v3("deepseek_v3"),
    _v3("kimi_k2"),
    _v2("greedy", None),
    _v2("group_limited_greedy", expert_groups(best=1)),
)
_SHARED = {f"mlp.shared_experts.{part}_proj.weight": f"ffn.shared.{part}.weight" for part in ("gate", "up", "down")}
_BIAS = {"mlp.gate.e_score_correction_bias": "ffn.router.expert_bias"}

COLUMNS = {
    "megatron": Column(
        rules=(*naming.MEGATRON_LATENT, *naming.MEGATRON_GATED, *naming.MEGATRON_EXPERTS),
        dialects=MEGATRON,
        tied_copy="output_layer.weight",
    ),
    "huggingface": Column(
        rules=(
            *naming.HUGGINGFACE_ENDS,
            *naming.HUGGINGFACE_LATENT,
            *naming.HUGGINGFACE_NORMS,
            *naming.HUGGINGFACE_FFN,
            *naming.HUGGINGFACE_EXPERTS,
            *naming.layer(naming.HUGGINGFACE_LAYER, _SHARED),
            *naming.layer(naming.HUGGINGFACE_LAYER, _BIAS, dtype="float32"),
            *naming.HUGGINGFACE_STACKED_EXPERTS,
        ),
        dialects=HUGGINGFACE,
        tied_copy="lm_head.weight",
        modules={naming.HUGGINGFACE_LAYER.format(i="*") + "eh_proj.weight": "multi-token prediction"},
    ),
}
