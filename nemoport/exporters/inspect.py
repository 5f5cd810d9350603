"""The verb `inspect`: what lies at a path, from names and headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemoport.errors import NemoportError
from nemoport.exporters import source
from nemoport.exporters.checkpoint import Checkpoint
from nemoport.exporters.formats import tokenizer
from nemoport.exporters.tensor import nbytes
from nemoport.spec import parameter_count, to_json


def inspect(path: Path, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Facts about a checkpoint as JSON data. What stands in the way of converting it is a fact too: `problem`."""
    stored = source.checkpoint(path, config)
    facts: dict[str, Any] = {
        "path": str(path),
        "format": stored.format,
        "writer": stored.writer,
        "naming": stored.naming,
        "tensors": len(stored.tensors),
        "bytes": sum(nbytes(tensor) for tensor in stored.tensors.values()),
        "dtypes": dict(Counter(tensor.dtype for tensor in stored.tensors.values()).most_common()),
        "trained": dict(stored.trained),
        "skipped": dict(Counter(stored.skipped.values())),
        "tokenizer": _tokenizer(stored),
        "pickles": [{"path": each.path, "verdict": each.verdict, "globals": each.globals} for each in stored.pickles],
    }
    try:
        model = source.resolved(stored)
    except NemoportError as error:
        return facts | {"problem": str(error)}
    rows = source.resolved(stored, "padded").spec.vocab_size
    return facts | {
        "family": model.spec.family,
        "parameters": parameter_count(model.spec),
        "vocabulary": {"true": model.spec.vocab_size, "padded": rows},
        "spec": to_json(model.spec),
    }


def _tokenizer(stored: Checkpoint) -> dict[str, Any] | None:
    if stored.tokenizer is None:
        return None
    return {"files": sorted(tokenizer.files(stored.tokenizer)), "ids": tokenizer.size(stored.tokenizer)}
