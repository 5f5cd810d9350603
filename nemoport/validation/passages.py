"""The text on which a quantized model is judged beside its source: the user's, or what the source itself says.

A quantized model may be wrong where the source is never asked, and random tokens would judge that. What the source
samples lies in its own distribution, whatever it was trained on, and needs neither a tokenizer nor a download.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nemoport import reference
from nemoport.calibration import tokens
from nemoport.errors import InputError, UsageError
from nemoport.exporters.checkpoint import Model
from nemoport.exporters.dequantized import all_dequantized
from nemoport.validation.prompts import SEED, Prompt

ROWS = 16
SAMPLED, LENGTH = 96, 256
"""Tokens of a row: of what the source is asked to say, one after the other, and of a text that is there."""
_LOGITS = 1 << 26
"""Logits held of a model at a time."""


@dataclass(frozen=True)
class Passages:
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


def passages(model: Model, path: Path | None, calibration: Mapping[str, Any] | None, digest: str | None) -> Passages:
    """The file that the user gave; what a calibration left of its own, whose digest says that the file is still the
    same; or the source's own words."""
    if path:
        return _given(path, model)
    return (calibration and _held_out(model, calibration, digest)) or _sampled(model)


def _held_out(model: Model, calibration: Mapping[str, Any], digest: str | None) -> Passages | None:
    """None where nothing is left, or the file is gone or another."""
    path = calibration.get("path")
    samples, length, batch = (calibration.get(key) for key in ("samples", "length", "batch"))
    if not isinstance(path, str) or not isinstance(samples, int):
        return None
    if not isinstance(length, int) or not isinstance(batch, int):
        return None
    limits = tokens.Limits(samples=samples + ROWS, length=length, batch=batch)
    try:
        rows = tokens.read(Path(path), model.checkpoint.tokenizer, limits).rows
    except (InputError, OSError):
        return None
    rest = rows[samples:, :LENGTH]
    if not len(rest) or rest.shape[1] < 2 or tokens.Tokens(rows[:samples], batch).digest != digest:
        return None
    return Passages(tokens.Tokens(rest), f"held out from {Path(path).name}")


def _given(path: Path, model: Model) -> Passages:
    if not path.is_file():
        raise UsageError(f"--text {path} is no file; give text, JSONL, or token ids in .npz")
    limits = tokens.Limits(samples=ROWS, length=min(LENGTH, model.spec.max_positions))
    found = tokens.read(path, model.checkpoint.tokenizer, limits, option="--text")
    if found.rows.shape[1] < 2:
        raise UsageError(f"--text {path} is a single token long, and none follows it; give a longer text")
    if (most := int(found.rows.max())) >= model.spec.vocab_size:
        raise UsageError(f"--text {path} has token {most}, and the vocabulary ends before {model.spec.vocab_size}")
    return Passages(found, path.name)


def _sampled(model: Model) -> Passages:
    length = min(SAMPLED, model.spec.max_positions)
    plain = all_dequantized(model.tensors)
    rows = reference.sampled(model.spec, plain, rows=ROWS, length=length, seed=SEED, device=reference.device())
    return Passages(tokens.Tokens(rows), "sampled from the source")
