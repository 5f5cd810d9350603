"""Distributed checkpoints, whichever backend wrote them: a directory that holds the whole model in many files.

- `torch_dist`, Megatron-core's: `.metadata`, `__R_S.distcp` and Megatron-core's own `common.pt` or `metadata.json`;
- `torch_dcp`, plain PyTorch, Megatron's FSDP included: the same without those two;
- `zarr`, Megatron-core's until 0.15: a directory for each tensor.
"""

from __future__ import annotations

import json
from pathlib import Path

from nemoport.exporters.formats import torch_dist, zarr
from nemoport.exporters.formats.torch_dist import Contents
from nemoport.exporters.formats.tree import Directory, Tree

candidates = torch_dist.candidates
INDEX = torch_dist.INDEX
COMMON, DESCRIPTION = "common.pt", "metadata.json"


def locate(path: Path) -> Path | None:
    """The directory of tensors, given it, a run directory, an iteration, or a directory with `weights/`."""
    return next((directory for directory in candidates(path) if kind(directory)), None)


def tree(path: Path) -> Tree:
    """The files of the one that lies at a path."""
    return Directory(locate(path) or path)


def kind(directory: Path) -> str | None:
    """Which of the three lies here, from names alone. Never an error."""
    try:
        if (directory / torch_dist.INDEX).is_file():
            owned = any((directory / name).is_file() for name in (COMMON, DESCRIPTION))
            return "torch_dist" if owned else "torch_dcp"
        return "zarr" if directory.is_dir() and _is_zarr(directory) else None
    except OSError:
        return None


def read(tree: Tree) -> Contents:
    """Every tensor, unread, and the names of the pickled objects beside them."""
    return torch_dist.read(tree) if tree.file(torch_dist.INDEX) else zarr.read(tree)


def _is_zarr(directory: Path) -> bool:
    try:
        said = json.loads((directory / DESCRIPTION).read_bytes()).get("sharded_backend")
    except (OSError, ValueError, RecursionError, AttributeError):
        said = None
    return said == "zarr" or any((entry / zarr.INDEX).is_file() for entry in directory.iterdir())
