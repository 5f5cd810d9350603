"""Megatron-core's `zarr`, bare: weights without a word on the architecture, which `--config` must bring."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemoport.exporters.checkpoint import Checkpoint
from nemoport.exporters.formats import distributed
from nemoport.exporters.readers.torch_dist import checkpoint

WRAPS: tuple[str, ...] = ()
LOOKS_FOR = "directories with .zarray"
NEEDED = ()
files = distributed.tree


def recognises(path: Path) -> bool:
    directory = distributed.locate(path)
    return directory is not None and distributed.kind(directory) == "zarr"


def read(path: Path, config: Mapping[str, Any] | None) -> Checkpoint:
    directory = distributed.locate(path)
    assert directory is not None
    return checkpoint(path, directory, format_name="zarr", writer="Megatron-core", config=config or {})
