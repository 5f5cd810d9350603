"""Megatron-LM's torch_dist or zarr: the arguments of the run lie in `common.pt`, a pickle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemoport.errors import DamagedInput
from nemoport.exporters.checkpoint import Checkpoint
from nemoport.exporters.formats import distributed, megatron, torch_zip
from nemoport.exporters.formats.tree import Directory
from nemoport.exporters.readers.torch_dist import checkpoint

WRAPS = ("torch_dist", "zarr")
LOOKS_FOR = "common.pt with Megatron-LM's arguments"
NEEDED = (distributed.INDEX, "common.pt")
files = distributed.tree
_COMMON = "common.pt"


def recognises(path: Path) -> bool:
    directory = distributed.locate(path)
    common = Directory(directory).file(_COMMON) if directory else None
    return common is not None and torch_zip.mentions(common, b"argparse")


def read(path: Path, config: Mapping[str, Any] | None) -> Checkpoint:
    directory = distributed.locate(path)
    assert directory is not None
    stored = Directory(directory).file(_COMMON)
    assert stored is not None
    common = torch_zip.load(stored)
    arguments = common.get("args") if isinstance(common, dict) else None
    if not isinstance(arguments, dict):
        raise DamagedInput(f"{directory / _COMMON} holds no args; give the architecture with --config FILE")
    words = megatron.words_of_arguments(arguments) | dict(config or {})
    return checkpoint(path, directory, format_name="megatron_lm", writer="Megatron-LM", config=words)
