"""What is made of a text's last vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nemoport.spec.axes import Axis, Tensors

Pooling = Literal["avg", "cls", "last"]
"""One vector of a text's tokens: their mean, the first or the last one. Padding is none of them, on whichever side."""


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """Logits over the vocabulary; `tied` uses the embedding as the output matrix. `softcap` bounds them:
    softcap * tanh(logits / softcap)."""

    tied: bool = False
    softcap: float | None = None

    def tensors(self, vocab: Axis, hidden: Axis) -> Tensors:
        return {} if self.tied else {"head.weight": (vocab, hidden)}


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """A vector for each text: its tokens pooled, then divided by its length (`normalized`). `matryoshka`: who asks may
    have its first `dimensions` alone, cut off before it is normalized (arXiv:2205.13147)."""

    pooling: Pooling = "avg"
    normalized: bool = True
    matryoshka: bool = False

    def tensors(self, vocab: Axis, hidden: Axis) -> Tensors:
        return {}


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """Logits over labels for each text, or its one score: (head(x) + bias) / temperature, where x are its tokens
    pooled, and with a `pooler` tanh(pooler(x)), as BERT has it."""

    labels: int
    pooling: Pooling = "cls"
    pooler: bool = False
    bias: bool = False
    temperature: float = 1.0

    def tensors(self, vocab: Axis, hidden: Axis) -> Tensors:
        labels = Axis("labels", self.labels, self.labels)
        named: Tensors = {}
        if self.pooler:
            named |= {"pooler.weight": (hidden, hidden), "pooler.bias": (hidden,)}
        return named | {"head.weight": (labels, hidden)} | ({"head.bias": (labels,)} if self.bias else {})


Head = LanguageModel | Embedding | Classifier
