"""The text on which a quantized model is judged beside its source: the user's, or what the source itself says.

A quantized model may be wrong where the source is never asked, and random tokens would judge that. What the source
samples lies in its own distribution, whatever it was trained on, and needs neither a tokenizer nor a download.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nemoport import reference
from nemoport.calibration import tokens
from nemoport.errors import UsageError
from nemoport.exporters.checkpoint import Model
from nemoport.exporters.dequantized import all_dequantized
from nemoport.validation.prompts import SEED, Prompt

ROWS = 16
SAMPLED, LENGTH = 96, 256
"""Tokens of a row: of what the source is asked to say, one after the other, and of a text that is there."""
_LOGITS = 1 << 26
"""Logits held of a model at a time."""


@dataclass(frozen=True)
class Text:
    tokens: tokens.Tokens
    source: str
    """Where it is from, for people."""

    def prompts(self, batch: int, vocab_size: int) -> Iterator[Prompt]:
        """In batches of at most `batch` rows, and of no more logits than fit."""
        rows = self.tokens.rows
        step = max(1, min(batch, _LOGITS // (rows.shape[1] * vocab_size)))
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            places = np.broadcast_to(np.arange(part.shape[1]), part.shape)
            yield Prompt("text", part, np.ones_like(part), places)


def text(path: Path | None, model: Model) -> Text:
    return _given(path, model) if path else _sampled(model)


def _given(path: Path, model: Model) -> Text:
    if not path.is_file():
        raise UsageError(f"--text {path} is no file; give text, JSONL, or token ids in .npz")
    limits = tokens.Limits(samples=ROWS, length=min(LENGTH, model.spec.max_positions))
    found = tokens.read(path, model.checkpoint.tokenizer, limits, option="--text")
    if found.rows.shape[1] < 2:
        raise UsageError(f"--text {path} is a single token long, and none follows it; give a longer text")
    if (most := int(found.rows.max())) >= model.spec.vocab_size:
        raise UsageError(f"--text {path} has token {most}, and the vocabulary ends before {model.spec.vocab_size}")
    return Text(found, path.name)


def _sampled(model: Model) -> Text:
    length = min(SAMPLED, model.spec.max_positions)
    plain = all_dequantized(model.tensors)
    rows = reference.sampled(model.spec, plain, rows=ROWS, length=length, seed=SEED, device=reference.device())
    return Text(tokens.Tokens(rows), "sampled from the source")
