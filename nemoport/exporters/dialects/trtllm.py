"""Keys of TensorRT-LLM's `config.json`, as rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemoport.errors import DamagedInput
from nemoport.exporters.configs import (
    Config,
    Dialect,
    Key,
    Keys,
    Mark,
    Row,
    Together,
    choice,
    flag,
    layers,
    number,
    whole_number,
)
from nemoport.exporters.dialects.rows import (
    Marks,
    Scaling,
    scaling_of,
    to_scaling,
)
from nemoport.exporters.words import Words
from nemoport.spec import YarnScaling


def _to_scaling(scaling: Scaling) -> dict[str, Any] | None:
    if isinstance(scaling, YarnScaling):
        raise DamagedInput("nemoport does not write YaRN for TensorRT-LLM")
    return to_scaling(scaling)


TRTLLM_ROPE: tuple[Row, ...] = (
    Key("rope_base", "rotary_base", into=number),
    Keys(
        "rope_scaling",
        lambda config: scaling_of(config.get("rotary_scaling") or {}),
        lambda scaling: {"rotary_scaling": _to_scaling(scaling)},
    ),
)
_TRTLLM_ROWS: tuple[Row, ...] = (
    Key("vocab_size", "vocab_size", into=whole_number),
    Key("hidden_size", "hidden_size", into=whole_number),
    Key("max_positions", "max_position_embeddings", into=whole_number),
    Key("layers", "num_hidden_layers", into=layers),
    Key("eps", "norm_epsilon", into=number),
    Key("tied", "share_embedding_table", False, flag),
    Key("heads", "num_attention_heads", into=whole_number),
    Key("kv_heads", "num_key_value_heads", into=whole_number),
    Key("head_dim", "head_size", into=whole_number),
    Key("intermediate", "intermediate_size", into=whole_number),
)
TRTLLM_ROTARY = (Mark("position_embedding_type", "rope_gpt_neox"),)
TRTLLM_GELU = choice("activation", "hidden_act", {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"})
"""Of every name, TensorRT-LLM computes the approximation: the exact one cannot be said."""


def trtllm(
    architecture: str,
    *rows: Row,
    marks: Marks = (),
    fixed: Mapping[str, Any] | None = None,
    constants: Mapping[str, Any] | None = None,
) -> Dialect:
    return Dialect(
        marks=(Mark("architecture", architecture), *marks),
        rows=(*_TRTLLM_ROWS, *rows),
        fixed=fixed or {},
        constants=constants or {},
    )


def no_experts(normalization_mode: int | None) -> dict[str, Any]:
    """What the format says of experts where there are none."""
    return {
        "num_experts": 0,
        "shared_expert_intermediate_size": 0,
        "top_k": 0,
        "normalization_mode": normalization_mode,
        "sparse_mixer_epsilon": 0.01,
        "tp_mode": 0,
        "device_limited_n_group": 0,
        "device_limited_topk_group": 0,
        "device_limited_routed_scaling_factor": 1.0,
    }


OF_LLAMA_AND_QWEN: dict[str, Any] = {
    "fc_after_embed": False,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "layer_idx_offset": 0,
    "disable_weight_only_quant_plugin": False,
}
OF_LLAMA: dict[str, Any] = OF_LLAMA_AND_QWEN | {"residual_mlp": False, "remove_duplicated_kv_heads": False}
"""What TensorRT-LLM's classes say of every model."""


def _experts(config: Config) -> Words:
    moe = config["moe"]
    if moe["normalization_mode"] not in (0, 1):
        raise ValueError(moe["normalization_mode"])
    return {
        "experts": whole_number(moe["num_experts"]),
        "top_k": whole_number(moe["top_k"]),
        "router_normalized": moe["normalization_mode"] == 1,
    }


def _to_experts(words: Words) -> dict[str, Any]:
    said = {"num_experts": words["experts"], "top_k": words["top_k"]}
    return {"moe": no_experts(int(words["router_normalized"])) | said}


TRTLLM_EXPERTS: tuple[Row, ...] = (
    Key("expert_intermediate", "intermediate_size", into=whole_number),
    Together(("experts", "top_k", "router_normalized"), _experts, _to_experts),
)
"""A softmax over all experts, or renormalized over the chosen ones (MoeConfig of tensorrt_llm 0.16)."""

OF_GPT: Mapping[str, Any] = {
    "q_scaling": 1,
    "embedding_scale": None,
    "apply_query_key_layer_scaling": False,
    "inner_layernorm": False,
    "norm_before_bmm1": False,
    "moe": no_experts(1),
}
"""What TensorRT-LLM's GPT class says of every model."""
