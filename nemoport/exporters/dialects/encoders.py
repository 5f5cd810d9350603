"""Keys of models that answer a text with one vector or with logits over labels, and what BERT and its kin share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemoport.exporters.configs import (
    AnyOf,
    Config,
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
from nemoport.exporters.dialects.huggingface import HUGGINGFACE_ACTIVATIONS, UNSAID, huggingface
from nemoport.exporters.dialects.rows import Marks
from nemoport.spec import Pooling

POOLINGS: Mapping[str, Pooling] = {"avg": "avg", "cls": "cls", "last": "last"}
"""The names of NeMo's and NVIDIA's embedding models (`LlamaBidirectionalConfig.pooling`)."""
POOLING = choice("pooling", "pooling", POOLINGS, "avg")
TEMPERATURE = Key("temperature", "temperature", 1.0, number)


def _matryoshka(config: Config) -> bool:
    return bool(flag(config.get("is_matryoshka") or False) or config.get("matryoshka_dimensions"))


def embedding(*, normalized: bool) -> tuple[Row, ...]:
    """`normalized` is what silence means: no config of transformers says it, sentence-transformers' files do. The keys
    of Matryoshka models are vLLM's."""
    return (
        POOLING,
        Key("normalized", "normalize", normalized, flag),
        Keys("matryoshka", _matryoshka, lambda yes: {"is_matryoshka": True} if yes else {}),
    )


def _labels(config: Config) -> int:
    """transformers writes the names of labels only where there are not two."""
    return whole_number(len(config["id2label"]) if config.get("id2label") else config.get("num_labels") or 2)


def _to_labels(count: int | None) -> dict[str, Any]:
    names = {str(label): f"LABEL_{label}" for label in range(count or 0)}
    return {"id2label": names, "label2id": {name: int(label) for label, name in names.items()}}


LABELS = Keys("labels", _labels, _to_labels)
NO_TEXT = Keys("tied", lambda config: False, lambda tied: {})
"""Nothing is written by a model without an output matrix, whatever its config says of one."""

_BERT = {
    "norm": "layer",
    "gated": False,
    "learned_positions": True,
    "embedding_norm": True,
    "norm_after": True,
    "final_norm": False,
    "causal": False,
    "qkv_bias": True,
    "out_bias": True,
    "ffn_bias": True,
}
_ROWS: tuple[Row, ...] = (
    Key("vocab_size", "vocab_size", into=whole_number),
    Key("hidden_size", "hidden_size", into=whole_number),
    Key("max_positions", "max_position_embeddings", 512, whole_number),
    Key("token_types", "type_vocab_size", 2, whole_number),
    Key("layers", "num_hidden_layers", into=layers),
    Key("eps", "layer_norm_eps", 1e-12, number),
    Key("heads", "num_attention_heads", into=whole_number),
    Keys("kv_heads", lambda config: config["num_attention_heads"], lambda heads: {}),
    UNSAID,
    Key("intermediate", "intermediate_size", into=whole_number),
    choice("activation", "hidden_act", HUGGINGFACE_ACTIVATIONS, "gelu"),
)
_MARKS = (
    Mark("position_embedding_type", "absolute", absent="absolute"),
    Mark("is_decoder", False, absent=False),
    Mark("add_cross_attention", False, absent=False),
)
ROBERTA: tuple[Marks, Mapping[str, Any]] = ((Mark("pad_token_id", 1, absent=1),), {"first_position": 2})
"""Positions are counted from the id of padding on."""
ALSO_BERT: tuple[Marks, Mapping[str, Any]] = ((), {})


def bert(
    model_type: str,
    architectures: tuple[str, ...],
    *rows: Row,
    kind: tuple[Marks, Mapping[str, Any]] = ALSO_BERT,
    fixed: Mapping[str, Any] | None = None,
) -> Dialect:
    """Of several architectures with the same tensors in them, the first is written."""
    first, *_ = architectures
    known = Mark("architectures", AnyOf([name] for name in architectures), absent=[first])
    marks, words = kind
    return huggingface(
        model_type, first, *_ROWS, *rows, marks=(known, *_MARKS, *marks), fixed={**_BERT, **words, **(fixed or {})}
    )
