"""From a repository on disk to what the rules look at. The only part that asks the disk, and never without bound: so
many entries of a directory, so many bytes of a config, no symbolic link twice, no tree walked."""

from __future__ import annotations

import json
import math
import os
import posixpath
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from nemoport import artifact
from nemoport.artifact import Artifact
from nemoport.check import graph, text
from nemoport.check.graph import Graph, Tensor
from nemoport.check.subject import File, Model, Trouble, Version
from nemoport.errors import NemoportError
from nemoport.repository.versions import NUMBER, evidence_of
from nemoport.runner.model_config import ModelConfig

CONFIG = "config.pbtxt"
MAX_ENTRIES = 10_000
"""In one directory."""
MAX_CONFIG = 256 << 10
"""Bytes; a long one has some 20 000."""
MAX_SIDECAR = 8 << 20
MAX_MANIFEST = 64 << 20
MAX_FOLDERS = 32
MAX_RANKS = 1 << 16

_TYPES = {
    "bool": "TYPE_BOOL",
    "string": "TYPE_STRING",
    "bfloat16": "TYPE_BF16",
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
} | {f"{sign}int{bits}": f"TYPE_{sign.upper()}INT{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}


@dataclass(frozen=True)
class Listing:
    files: Mapping[str, File]
    troubles: tuple[Trouble, ...]

    @property
    def directories(self) -> tuple[str, ...]:
        return tuple(name for name, file in self.files.items() if file.size is None)


def listing(root: Path, path: str, limit: int = MAX_ENTRIES) -> Listing:
    """What lies directly in a directory, sorted, with the size of each file."""
    files: dict[str, File] = {}
    troubles = []
    try:
        with os.scandir(root / path) as entries:
            for number, entry in enumerate(entries):
                if number >= limit:
                    troubles.append(
                        Trouble(path, f"{path} has more than {limit} entries, and only so many were looked at")
                    )
                    break
                try:
                    files[entry.name] = File(None if entry.is_dir() else entry.stat().st_size)
                except OSError as error:
                    troubles.append(_trouble(posixpath.join(path, entry.name), error))
    except OSError as error:
        troubles.append(_trouble(path, error))
    return Listing(dict(sorted(files.items())), tuple(troubles))


def model(root: Path, name: str) -> tuple[Model, ...]:
    """A model once for each of its configs: config.pbtxt, or none, and every configs/NAME.pbtxt."""
    inside = listing(root, name)
    others = listing(root, f"{name}/configs").files if "configs" in inside.directories else ()
    configs = (CONFIG, *(f"configs/{file}" for file in others if file.endswith(".pbtxt")))
    return tuple(_with_config(root, name, inside, config) for config in configs)


def _with_config(root: Path, name: str, inside: Listing, config: str) -> Model:
    path = f"{name}/{config}"
    there = config != CONFIG or config in inside.files
    read, troubles = _config(root, path) if there else (None, ())
    first = listing(root, f"{name}/{inside.directories[0]}").files if inside.directories else ()
    made = Model(
        name=name,
        config_path=path,
        has_config=there,
        text=read,
        directories=inside.directories,
        files=inside.files,
        first_files=tuple(first),
        versions={
            int(each): Version(number=int(each), path=f"{name}/{each}", files={})
            for each in inside.directories
            if len(each) <= 18 and NUMBER.fullmatch(each)
        },
        troubles=troubles if config != CONFIG else (*inside.troubles, *troubles),
    )
    if made.config is None:
        return made
    versions = {number: _version(root, made, made.versions[number]) for number in made.served}
    return replace(
        made,
        versions={**made.versions, **versions},
        files={**inside.files, **_named(root / name, _names(made.config))},
        troubles=(*made.troubles, *(trouble for each in versions.values() for trouble in each.troubles)),
    )


def _version(root: Path, owner: Model, bare: Version) -> Version:
    inside = listing(root, bare.path)
    folders = {bare.path: tuple(inside.files)}
    for folder in inside.directories[:MAX_FOLDERS]:
        folders[f"{bare.path}/{folder}"] = tuple(listing(root, f"{bare.path}/{folder}").files)
    assert owner.config is not None
    graphs, bad = _graphs(root, owner.config, bare.path, inside)
    evidence = evidence_of(root, owner.name) / str(bare.number)
    made = manifest(evidence) if (evidence / artifact.MANIFEST).is_file() else None
    spans, said_by, rank_files = _ranks(root / bare.path, inside)
    if isinstance(made, Artifact):
        graphs = (*graphs, *_signature(made))
    needed = [need.location for each in graphs for need in each.external]
    return replace(
        bare,
        files=inside.files,
        folders=folders,
        graphs=graphs,
        made=made if isinstance(made, Artifact) else None,
        bad_graph=bad,
        external=_named(root / bare.path, needed),
        ranks=spans,
        ranks_from=said_by,
        rank_files=rank_files,
        troubles=(*inside.troubles, *([Trouble(bare.path, made.reason)] if isinstance(made, Trouble) else [])),
    )


def _config(root: Path, path: str) -> tuple[text.Text | None, tuple[Trouble, ...]]:
    content, trouble = _small_file(root, path, MAX_CONFIG)
    if content is None:
        return None, trouble
    try:
        return text.read(content.decode()), ()
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        return None, (Trouble(path, f"byte {error.start}, on line {line}, is not UTF-8"),)


def _small_file(root: Path, path: str, limit: int) -> tuple[bytes | None, tuple[Trouble, ...]]:
    """A regular file, if it is not too large; a pipe or a device is not opened."""
    try:
        status = (root / path).stat()
        if not stat.S_ISREG(status.st_mode):
            return None, (Trouble(path, "not a file"),)
        if status.st_size > limit:
            return None, (Trouble(path, f"{status.st_size} bytes, and no more than {limit} are read"),)
        return (root / path).read_bytes(), ()
    except OSError as error:
        return None, (_trouble(path, error),)


def _graphs(root: Path, config: ModelConfig, path: str, inside: Listing) -> tuple[tuple[Graph, ...], Trouble | None]:
    name = config.default_model_filename
    if config.backend != "onnxruntime" or not (root / path / name).is_file():
        return (), None
    try:
        return (graph.read(root / path / name, name),), None
    except graph.Unreadable as error:
        return (), Trouble(f"{path}/{name}", str(error))
    except OSError as error:
        return (), _trouble(f"{path}/{name}", error)


def manifest(directory: Path) -> Artifact | Trouble:
    """What an artifact says of itself, or why that cannot be known."""
    try:
        if (directory / artifact.MANIFEST).stat().st_size > MAX_MANIFEST:
            return Trouble(artifact.MANIFEST, f"more than {MAX_MANIFEST} bytes, and no more are read")
        return artifact.read_manifest(directory)
    except (NemoportError, OSError, RecursionError, AttributeError) as error:
        return Trouble(artifact.MANIFEST, str(error))


def _signature(made: Artifact) -> tuple[Graph, ...]:
    if made.signature is None:
        return ()
    inputs, outputs = (
        tuple(Tensor(each.name, _TYPES.get(each.dtype), each.shape) for each in side)
        for side in (made.signature.inputs, made.signature.outputs)
    )
    return (Graph(artifact.MANIFEST, inputs, outputs),)


def _ranks(version: Path, inside: Listing) -> tuple[int | None, str, int | None]:
    """Devices that an instance spans, the file that says so, and how many files of ranks there must be."""
    for name, read, rows in _RANKS:
        if name in inside.files:
            content, _ = _small_file(version, name, MAX_SIDECAR)
            for keys in rows:
                if content is not None and (found := _product(_parsed(content, read), keys)):
                    return found, name, found if name == "config.json" else None
    return None, "", None


def _parsed(content: bytes, read: Callable[[bytes], Any]) -> Any:
    try:
        return read(content)
    except (ValueError, RecursionError, yaml.YAMLError):
        return None


def _product(facts: Any, keys: tuple[str, ...]) -> int | None:
    """`a.b` is a key in a mapping; a key that is missing counts as 1, all of them as nothing."""
    found = []
    for key in keys:
        value = facts
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if isinstance(value, int) and 0 < value <= MAX_RANKS:
            found.append(value)
    return math.prod(found) if found else None


def _names(config: ModelConfig) -> list[str]:
    """The files that a config names, counted from the model's directory."""
    labels = [tensor.label_filename for tensor in config.output]
    samples = [f"warmup/{each.input_data_file}" for sample in config.model_warmup for each in sample.inputs.values()]
    return [posixpath.normpath(name) for name in (*labels, *samples) if name]


def _named(directory: Path, names: Iterable[str]) -> dict[str, File]:
    """Those that are there and inside the directory."""
    found = {}
    for name in names:
        if posixpath.isabs(name) or ".." in name.split("/"):
            continue
        try:
            status = (directory / name).stat()
        except (OSError, ValueError):
            continue
        found[name] = File(None if stat.S_ISDIR(status.st_mode) else status.st_size)
    return found


def _trouble(path: str, error: OSError) -> Trouble:
    return Trouble(path, f"it cannot be read: {error.strerror or error}")


_SIZES = ("tensor_parallel_size", "pipeline_parallel_size")
_RANKS: tuple[tuple[str, Callable[[bytes], Any], tuple[tuple[str, ...], ...]], ...] = (
    ("model.json", json.loads, (_SIZES,)),
    ("model.yaml", yaml.safe_load, (_SIZES,)),
    (
        "config.json",
        json.loads,
        (("mapping.world_size",), ("pretrained_config.mapping.world_size",), ("mapping.tp_size", "mapping.pp_size")),
    ),
)
"""Where vLLM's, TensorRT-LLM's LLM API and TensorRT-LLM's checkpoints and engines say how many devices they span."""
