"""Megatron-core's `torch_dist`, bare: weights without a word on the architecture, which `--config` must bring."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemoport.exporters.checkpoint import Checkpoint
from nemoport.exporters.formats import megatron, tokenizer, torch_dist
from nemoport.exporters.formats.tree import Directory, Tree

WRAPS: tuple[str, ...] = ()


def recognises(path: Path) -> bool:
    return torch_dist.locate(path) is not None


def read(path: Path, config: Mapping[str, Any] | None) -> Checkpoint:
    directory = torch_dist.locate(path)
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
) -> Checkpoint:
    """The checkpoint whose weights lie in `directory`, for this reader and for those that wrap it."""
    contents = torch_dist.read(Directory(directory))
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
    )
