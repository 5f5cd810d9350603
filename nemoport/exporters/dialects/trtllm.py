"""Keys of TensorRT-LLM's `config.json`, as rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemoport.exporters.configs import (
    Dialect,
    Key,
    Keys,
    Mark,
    Row,
    choice,
    flag,
    layers,
    number,
    whole_number,
)
from nemoport.exporters.dialects.rows import (
    Marks,
    scaling_of,
    to_scaling,
)

TRTLLM_ROPE: tuple[Row, ...] = (
    Key("rope_base", "rotary_base", into=number),
    Keys(
        "rope_scaling",
        lambda config: scaling_of(config.get("rotary_scaling") or {}),
        lambda scaling: {"rotary_scaling": to_scaling(scaling)},
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


OF_GPT: Mapping[str, Any] = {
    "q_scaling": 1,
    "embedding_scale": None,
    "apply_query_key_layer_scaling": False,
    "inner_layernorm": False,
    "norm_before_bmm1": False,
    "moe": no_experts(1),
}
"""What TensorRT-LLM's GPT class says of every model."""
