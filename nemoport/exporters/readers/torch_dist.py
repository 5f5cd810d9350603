"""Megatron-core's `torch_dist`, bare: weights without a word on the architecture, which `--config` must bring."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemoport.exporters.checkpoint import Checkpoint
from nemoport.exporters.formats import distributed, megatron, tokenizer
from nemoport.exporters.formats.torch_dist import Contents
from nemoport.exporters.formats.tree import Directory, Tree

WRAPS: tuple[str, ...] = ()
LOOKS_FOR = ".metadata with common.pt"
NEEDED = (distributed.INDEX,)
files = distributed.tree


def recognises(path: Path) -> bool:
    directory = distributed.locate(path)
    return directory is not None and distributed.kind(directory) == "torch_dist"


def read(path: Path, config: Mapping[str, Any] | None) -> Checkpoint:
    directory = distributed.locate(path)
    assert directory is not None
    return checkpoint(path, directory, format_name="torch_dist", writer="Megatron-core", config=config or {})


def checkpoint(
    path: Path,
    directory: Path,
    *,
    format_name: str,
    writer: str,
    config: Mapping[str, Any],
    tokenizers: tuple[Tree, ...] = (),
    contents: Contents | None = None,
) -> Checkpoint:
    """The checkpoint whose weights lie in `directory`, for this reader and for those that wrap it."""
    contents = distributed.read(Directory(directory)) if contents is None else contents
    tensors, skipped = megatron.weights(contents.tensors, contents.objects)
    return Checkpoint(
        path=path,
        format=format_name,
        writer=writer,
        naming="megatron",
        config=config,
        tensors=tensors,
        skipped=skipped,
        tokenizer=tokenizer.find(*tokenizers, Directory(directory / "tokenizer"), Directory(path / "tokenizer")),
        trained=megatron.trained(config),
        masters=megatron.masters(contents.tensors),
    )
