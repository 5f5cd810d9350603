"""Keys of Hugging Face's configs, as rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemoport.exporters.configs import (
    Config,
    Dialect,
    Key,
    Keys,
    Mark,
    Row,
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
from nemoport.spec import Groups


def huggingface_rope(config: Config) -> Config:
    """transformers 5 gathers in `rope_parameters` what 4 had in `rope_theta` and `rope_scaling`."""
    return config.get("rope_parameters") or {
        "rope_theta": config.get("rope_theta"),
        **(config.get("rope_scaling") or {}),
    }


HUGGINGFACE_ROPE: tuple[Row, ...] = (
    Keys(
        "rope_base",
        lambda config: number(huggingface_rope(config).get("rope_theta") or 10000.0),
        lambda base: {"rope_theta": base},
    ),
    Keys(
        "rope_scaling",
        lambda config: scaling_of(huggingface_rope(config)),
        lambda scaling: {"rope_scaling": to_scaling(scaling)},
    ),
)


def huggingface_fraction(default: float) -> Keys:
    return Keys(
        "rope_fraction",
        lambda config: number(
            huggingface_rope(config).get("partial_rotary_factor") or config.get("partial_rotary_factor") or default
        ),
        lambda fraction: {"partial_rotary_factor": fraction},
    )


DIVIDED = Key("head_dim", "head_dim", lambda words: words["hidden_size"] // words["heads"], whole_number)
UNSAID = Keys("head_dim", lambda config: config["hidden_size"] // config["num_attention_heads"], lambda size: {})
"""The size of a head where the config has no key for it."""


def huggingface_sizes(
    eps: Key, *, tied: bool = False, head_dim: Row = DIVIDED, positions: int = 2048
) -> tuple[Row, ...]:
    """`tied` and `positions` are what an absent key means."""
    return (
        Key("vocab_size", "vocab_size", into=whole_number),
        Key("hidden_size", "hidden_size", into=whole_number),
        Key("max_positions", "max_position_embeddings", positions, whole_number),
        Key("layers", "num_hidden_layers", into=layers),
        eps,
        Key("tied", "tie_word_embeddings", tied, flag),
        Key("heads", "num_attention_heads", into=whole_number),
        Key("kv_heads", "num_key_value_heads", lambda words: words["heads"], whole_number),
        head_dim,
        Key("intermediate", "intermediate_size", into=whole_number),
    )


def experts(count: str, width: str) -> tuple[Row, ...]:
    """The keys that differ are those of how many experts there are, and of how wide. For the first, transformers 5
    saves a name of its own."""
    return (
        Keys(
            "experts",
            lambda config: whole_number(config[count if config.get(count) is not None else "num_local_experts"]),
            lambda experts: {count: experts},
        ),
        Key("top_k", "num_experts_per_tok", into=whole_number),
        Key("expert_intermediate", width, into=whole_number),
    )


def expert_groups(best: int) -> Keys:
    """Groups of which all may be chosen are none."""

    def of(config: Config) -> Groups | None:
        count, top = (whole_number(config.get(key) or 1) for key in ("n_group", "topk_group"))
        return Groups(count, top, best) if top < count else None

    def write(groups: Groups | None) -> dict[str, Any]:
        return {"n_group": groups.count if groups else 1, "topk_group": groups.top if groups else 1}

    return Keys("expert_groups", of, write)


RMS_EPS = Key("eps", "rms_norm_eps", 1e-6, number)
HUGGINGFACE_ACTIVATIONS = {
    "silu": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
    "relu2": "relu2",
}


def huggingface(
    model_type: str,
    architecture: str,
    *rows: Row,
    marks: Marks = (),
    fixed: Mapping[str, Any] | None = None,
    constants: Mapping[str, Any] | None = None,
) -> Dialect:
    return Dialect(
        marks=(Mark("model_type", model_type), *marks),
        rows=rows,
        fixed=fixed or {},
        constants={"architectures": [architecture], "use_cache": True, **(constants or {})},
    )
