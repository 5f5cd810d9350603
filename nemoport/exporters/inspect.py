"""The verb `inspect`: what lies at a path, from names and headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemoport.errors import NemoportError
from nemoport.exporters import source
from nemoport.exporters.checkpoint import Checkpoint
from nemoport.exporters.formats import tokenizer
from nemoport.exporters.lora import Adapter
from nemoport.exporters.quantized import quantization
from nemoport.exporters.tensor import nbytes
from nemoport.spec import parameter_count, to_json


def inspect(path: Path, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Facts about a checkpoint as JSON data. What stands in the way of converting it is a fact too: `problem`."""
    if (adapter := source.adapter_alone(path)) is not None:
        return _adapter(adapter)
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
    if (how := quantization(stored)) is not None:
        facts["quantization"] = asdict(how)
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


def _adapter(found: Adapter) -> dict[str, Any]:
    """Facts about an adapter that lies alone."""
    return {
        "path": str(found.path),
        "format": f"adapter ({found.format})",
        "writer": found.writer,
        "naming": found.naming,
        "adapter": {
            "scaling": sorted({str(pair) for pair in found.pairs}),
            "linears": dict(Counter(pair.linear.rpartition(".")[2] for pair in found.pairs)),
        },
        "tensors": len(found.tensors),
        "bytes": sum(nbytes(tensor) for tensor in found.tensors.values()),
        "dtypes": dict(Counter(tensor.dtype for tensor in found.tensors.values()).most_common()),
        "trained": {},
        "skipped": dict(Counter(found.skipped.values())),
        "tokenizer": None,
        "pickles": [],
    }


def _tokenizer(stored: Checkpoint) -> dict[str, Any] | None:
    if stored.tokenizer is None:
        return None
    return {"files": sorted(tokenizer.files(stored.tokenizer)), "ids": tokenizer.size(stored.tokenizer)}
