"""Calibration: what a model's activations look like on given text, as the scales of a quantization want it.

The reference runs the model layer by layer from disk; of every linear's input the largest and the mean magnitude of
each channel are kept, of every attention the largest key and value, and for AWQ what each exponent would cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from nemoport.calibration.tokens import Limits, read
from nemoport.errors import UsageError
from nemoport.exporters import source, statistics
from nemoport.exporters.checkpoint import Model
from nemoport.exporters.convert import Calibration
from nemoport.exporters.statistics import Statistics

__all__ = ["Limits", "from_statistics", "from_tokens"]


def from_tokens(path: Path, checkpoint: Path, config: Mapping[str, Any] | None, limits: Limits) -> Calibration:
    """Calibration on a text, a JSONL file or token ids, which are read now; the model is run later."""
    if not path.is_file():
        raise UsageError(f"--calib {path} is no file; give text, JSONL, or token ids in .npz")
    tokens = read(path, source.checkpoint(checkpoint, config).tokenizer, limits)
    taken = {"path": str(path.resolve()), **asdict(limits)}
    return Calibration(digest=tokens.digest, statistics=partial(_observed, tokens=tokens), taken=taken)


def from_statistics(path: Path) -> Calibration:
    """What an earlier calibration left."""
    found, digest = statistics.read(path)
    return Calibration(digest=digest, statistics=lambda model, needs: found)


def _observed(model: Model, needs: tuple[str, ...], *, tokens: Any) -> Statistics:
    from nemoport.calibration.observe import observed

    return observed(model, tokens, needs)
