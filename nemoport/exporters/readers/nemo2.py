"""NeMo 2.0: `weights/` in torch_dist, zarr or torch_dcp, and `context/` with `model.yaml`, or `io.json` alone in older
ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemoport.errors import DamagedInput
from nemoport.exporters.checkpoint import Checkpoint
from nemoport.exporters.formats import distributed, fiddle, megatron
from nemoport.exporters.formats.structured import mapping
from nemoport.exporters.formats.tree import Directory, Tree
from nemoport.exporters.readers.torch_dist import checkpoint

WRAPS = ("torch_dist", "torch_dcp", "zarr", "megatron_lm")
LOOKS_FOR = "weights/ beside context/"
NEEDED = (distributed.INDEX, f"*/{distributed.INDEX}")


def recognises(path: Path) -> bool:
    directory = distributed.locate(path)
    return directory is not None and _context(directory) is not None


def files(path: Path) -> Tree:
    """The context is among them, where it lies beside the weights."""
    directory = distributed.locate(path)
    assert directory is not None
    context = _context(directory)
    return Directory(directory.parent if context in (directory.parent / "context", directory.parent) else directory)


def read(path: Path, config: Mapping[str, Any] | None) -> Checkpoint:
    directory = distributed.locate(path)
    assert directory is not None
    context = _context(directory)
    assert context is not None
    words = megatron.words_of_config(_config(context)) | dict(config or {})
    # The tokenizer lies in a directory named after the one it was copied from.
    tokenizers = tuple(Directory(entry) for entry in sorted(context.iterdir()) if entry.is_dir())
    return checkpoint(path, directory, format_name="nemo2", writer="NeMo 2.0", config=words, tokenizers=tokenizers)


def _context(weights: Path) -> Path | None:
    """The directory of model.yaml or io.json: `context/` beside the weights, or their own (older ones)."""
    candidates = (weights.parent / "context", weights.parent, weights / "context", weights)
    return next(
        (path for path in candidates if any((path / name).is_file() for name in ("model.yaml", "io.json"))), None
    )


def _config(context: Path) -> Mapping[str, Any]:
    if (context / "model.yaml").is_file():
        config = mapping(context / "model.yaml").get("config")
        if not isinstance(config, Mapping):
            raise DamagedInput(f"{context / 'model.yaml'} has no `config`; give the architecture with --config FILE")
        return config
    return fiddle.model_config(context / "io.json")
