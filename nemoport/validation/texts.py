"""The texts that every validation of an encoder runs: seeded, of awkward lengths, alone and in batches, padded on
either side, with every token type, and for a Matryoshka model with every row cut elsewhere."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from nemoport.spec import Embedding, ModelSpec
from nemoport.validation.prompts import SEED, Prompt

LONGEST = 512
"""Tokens of the longest text: all positions of most encoders."""
_LENGTHS = (31, 5, 18, 2, 64, 11, 40, 7)


def texts(spec: ModelSpec, batch: int) -> tuple[Prompt, ...]:
    """In batches of at most `batch` rows."""
    longest = min(LONGEST, spec.longest)
    lengths = [min(length, longest) for length in _LENGTHS[:batch]]
    return (
        _text(spec, "one short text", [min(7, longest)], left=False),
        _text(spec, f"{len(lengths)} texts, padded on the right", lengths, left=False),
        _text(spec, f"{len(lengths[:3])} texts, padded on the left", lengths[:3], left=True),
        _text(spec, "one long text", [longest], left=False),
    )


def alone(texts: Prompt) -> tuple[Prompt, ...]:
    """Each row without its padding."""
    spans = [np.flatnonzero(row) for row in texts.mask]
    return tuple(
        texts.taken(slice(number, number + 1), slice(int(span[0]), int(span[-1]) + 1))
        for number, span in enumerate(spans)
    )


def _text(spec: ModelSpec, name: str, lengths: list[int], *, left: bool) -> Prompt:
    width, draw = max(lengths), np.random.default_rng(SEED + sum(lengths) + left)
    mask = np.stack([np.arange(width) < length for length in lengths]).astype(np.int64)
    mask = np.flip(mask, axis=1).copy() if left else mask
    tokens = draw.integers(0, spec.vocab_size, mask.shape) * mask
    made = Prompt(name, tokens, mask, np.maximum(np.cumsum(mask, axis=1) - 1, 0))
    if spec.token_types > 1:
        made = replace(made, token_types=draw.integers(0, spec.token_types, mask.shape) * mask)
    if isinstance(spec.head, Embedding) and spec.head.matryoshka:
        made = replace(made, dimensions=draw.integers(1, spec.hidden_size + 1, len(lengths)))
    return made


def answer_of(spec: ModelSpec) -> str:
    return "embeddings" if isinstance(spec.head, Embedding) else "logits"
