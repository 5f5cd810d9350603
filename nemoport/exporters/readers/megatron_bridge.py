"""Megatron-Bridge: torch_dist, zarr or FSDP's torch_dcp with `run_config.yaml` beside the weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemoport.errors import DamagedInput
from nemoport.exporters.checkpoint import Checkpoint
from nemoport.exporters.formats import distributed, megatron
from nemoport.exporters.formats.structured import mapping
from nemoport.exporters.readers.torch_dist import checkpoint

WRAPS = ("torch_dist", "torch_dcp", "zarr", "megatron_lm")
LOOKS_FOR = "run_config.yaml"
NEEDED = (distributed.INDEX,)
files = distributed.tree
_CONFIG = "run_config.yaml"


def recognises(path: Path) -> bool:
    directory = distributed.locate(path)
    return directory is not None and (directory / _CONFIG).is_file()


def read(path: Path, config: Mapping[str, Any] | None) -> Checkpoint:
    directory = distributed.locate(path)
    assert directory is not None
    model = mapping(directory / _CONFIG).get("model")
    if not isinstance(model, Mapping):
        raise DamagedInput(f"{directory / _CONFIG} has no `model` section; give the architecture with --config FILE")
    words = megatron.words_of_config(model) | dict(config or {})
    return checkpoint(path, directory, format_name="megatron_bridge", writer="Megatron-Bridge", config=words)
