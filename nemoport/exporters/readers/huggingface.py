"""Hugging Face: `config.json` and safetensors, in one file or sharded with an index."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemoport.errors import DamagedInput
from nemoport.exporters.checkpoint import Checkpoint
from nemoport.exporters.formats import safetensors, sentence_transformers, tokenizer
from nemoport.exporters.formats.structured import mapping
from nemoport.exporters.formats.tree import Directory, Tree
from nemoport.exporters.tensor import Files, LazyTensor

WRAPS: tuple[str, ...] = ()
LOOKS_FOR = "config.json with safetensors"
NEEDED = ()
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_BUFFERS = ".rotary_emb.inv_freq"


def recognises(path: Path) -> bool:
    return (path / CONFIG).is_file() and any((path / name).is_file() for name in (WEIGHTS, INDEX))


def words(path: Path, config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The config of a directory, the user's own words before it."""
    found = mapping(path / CONFIG) | sentence_transformers.words(Directory(path)) | dict(config or {})
    if not isinstance(quantized := found.get("quantization_config") or {}, Mapping):
        raise DamagedInput(f"{path / CONFIG} says quantization_config: {quantized!r}, which is no mapping")
    return found


def skipped_by(name: str) -> str | None:
    """The rule that skips a stored tensor, if one does."""
    return "rotary frequencies" if name.endswith(_BUFFERS) else None


def files(path: Path) -> Tree:
    return Directory(path)


def read(path: Path, config: Mapping[str, Any] | None) -> Checkpoint:
    found = words(path, config)
    stored = _sharded(path) if (path / INDEX).is_file() else safetensors.read(Files(), path / WEIGHTS)
    return Checkpoint(
        path=path,
        format="huggingface",
        writer="Hugging Face transformers",
        naming="huggingface",
        config=found,
        tensors={name: tensor for name, tensor in stored.items() if not skipped_by(name)},
        skipped={name: rule for name in stored if (rule := skipped_by(name))},
        tokenizer=tokenizer.find(Directory(path)),
    )


def _sharded(path: Path) -> dict[str, LazyTensor]:
    """Every tensor of the index from the shard that the index names; files, missing and extra tensors checked apart."""
    index = mapping(path / INDEX).get("weight_map")
    if not isinstance(index, Mapping) or not all(isinstance(name, str) for name in index.values()):
        raise DamagedInput(f"{path / INDEX} holds no weight_map of names; copy the checkpoint again")
    shards = sorted(set(index.values()))
    if outside := [name for name in shards if Path(name).name != name]:
        raise DamagedInput(f"{INDEX} points outside its directory, to {outside[0]}; it was tampered with")
    if missing := [name for name in shards if not (path / name).is_file()]:
        raise DamagedInput(f"{len(missing)} of {len(shards)} shards are missing, the first is {missing[0]}; copy them")
    files = Files()
    found = {
        name: (shard, tensor) for shard in shards for name, tensor in safetensors.read(files, path / shard).items()
    }
    if absent := [name for name, shard in index.items() if name not in found or found[name][0] != shard]:
        raise DamagedInput(f"{len(absent)} tensors of {INDEX} are not in their shards, the first is {absent[0]}")
    if extra := [name for name in found if name not in index]:
        raise DamagedInput(f"{len(extra)} tensors are in shards but not in {INDEX}, the first is {extra[0]}")
    return {name: tensor for name, (_, tensor) in found.items()}
