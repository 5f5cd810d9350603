"""PyTorch's distributed checkpoint format, as Megatron-core's `torch_dist` uses it.

A directory of `.metadata`, a pickled index of chunks, and `__RANK_N.distcp` files of concatenated `torch.save`
archives. The index says where each chunk's archive lies; its numbers are the stored member `<stem>/data/0`, found
through the archive's directory when it is first read, so no second pickle is opened. Sources:
torch/distributed/checkpoint/{metadata,filesystem}.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from nemoport.errors import DamagedInput, UnsupportedInput
from nemoport.exporters.dtypes import itemsize, known
from nemoport.exporters.formats import torch_zip
from nemoport.exporters.formats.shards import tiled
from nemoport.exporters.formats.torch_zip import LARGEST_PICKLE
from nemoport.exporters.formats.tree import Part, Tree, content
from nemoport.exporters.formats.unpickle import Name, Record, unpickle
from nemoport.exporters.tensor import Deferred, LazyTensor, Store, stored

INDEX = ".metadata"


@dataclass(frozen=True)
class Contents:
    tensors: Mapping[str, LazyTensor]
    objects: Mapping[str, Store | None]
    """What is stored as pickled bytes, such as `_extra_state` and RNG states: its name and where it lies, if it does.
    Not opened here."""
    archives: int = 0
    """How many `torch.save` archives the tensors and objects lie in, whose pickles are never opened."""


def locate(path: Path) -> Path | None:
    """The directory of the index, given it, or any of those around it."""
    return next((directory for directory in candidates(path) if (directory / INDEX).is_file()), None)


def candidates(path: Path) -> tuple[Path, ...]:
    """Where the tensors of a path may lie: in itself, in its `weights/`, or in the iteration that its tracker names."""
    tracker = path / "latest_checkpointed_iteration.txt"
    try:
        word = tracker.read_text(errors="replace").strip() if tracker.is_file() else ""
    except OSError:
        word = ""
    if not word:
        return path, path / "weights"
    return (
        path,
        path / "weights",
        path / (f"iter_{int(word):07d}" if word.isdecimal() and len(word) < 12 else "release"),
    )


def read(tree: Tree) -> Contents:
    """Every tensor of the checkpoint, unread: the whole one, whatever ranks wrote it."""
    found = tree.file(INDEX)
    index = unpickle(content(found, LARGEST_PICKLE), INDEX) if found else None
    if not isinstance(index, Record) or not isinstance(index.get("state_dict_metadata"), dict):
        raise DamagedInput(f"{tree.name}/{INDEX} is no index of a distributed checkpoint; copy the checkpoint again")
    places = _places(tree, index)
    tensors: dict[str, LazyTensor] = {}
    objects: dict[str, Store | None] = {}
    for name, entry in index["state_dict_metadata"].items():
        if not isinstance(name, str) or not isinstance(entry, Record):
            raise DamagedInput(f"{INDEX} has an entry {name!r} that is no tensor; copy the checkpoint again")
        if "chunks" not in entry:
            objects[name] = _object(places.get((name, ())))
            continue
        try:
            tensors[name] = _tensor(name, entry, places)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise DamagedInput(f"{INDEX} describes {name} in a way torch does not ({error!r})") from error
    return Contents(tensors, objects, len(places))


@dataclass(frozen=True)
class _Place:
    """A chunk's archive: a run of bytes of a file."""

    path: str
    store: Store | None
    """None where the file is missing."""
    offset: int
    length: int


def _places(tree: Tree, index: Record) -> dict[tuple[str, tuple[int, ...]], _Place]:
    """Where each chunk's archive lies, by tensor name and corner."""
    places = {}
    look = cache(tree.file)
    try:
        for key, info in index["storage_data"].items():
            path = info["relative_path"]
            if not isinstance(path, str) or "/" in path or path in ("", ".", ".."):
                raise DamagedInput(f"{INDEX} points outside its directory, to {path!r}; it was tampered with")
            if info.get("transform_descriptors"):
                raise UnsupportedInput(f"{path} is transformed by {info['transform_descriptors']}; save it without")
            if type(info["offset"]) is not int or type(info["length"]) is not int:
                raise ValueError(info["offset"], info["length"])
            corner = tuple(key.get("offset") or ())
            places[key["fqn"], corner] = _Place(path, look(path), info["offset"], info["length"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DamagedInput(f"{INDEX} holds no usable storage index ({error!r}); copy the checkpoint again") from error
    return places


def _tensor(name: str, entry: Record, places: Mapping[tuple[str, tuple[int, ...]], _Place]) -> LazyTensor:
    shape = _dimensions(entry["size"])
    dtype = known(_dtype(entry["properties"]), name)
    pieces = []
    for chunk in entry["chunks"]:
        corner, sizes = _dimensions(chunk["offsets"]), _dimensions(chunk["sizes"])
        if not prod(sizes):  # of a rank that owns nothing of the tensor
            continue
        place = places.get((name, corner)) or places.get((name, ()))
        if place is None:
            raise DamagedInput(f"{INDEX} does not say where the chunk of {name} at {list(corner)} is stored")
        pieces.append((corner, _chunk(name, place, sizes, dtype)))
    return tiled(name, shape, dtype, pieces, INDEX)


def _object(place: _Place | None) -> Store | None:
    if place is None or place.store is None or not 0 <= place.offset <= place.offset + place.length <= place.store.size:
        return None
    return Part(place.path, place.store, place.offset, place.length)


def _dimensions(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not all(type(size) is int and 0 <= size < 2**48 for size in value):
        raise ValueError(f"sizes {value!r}")
    return tuple(value)


def _dtype(properties: Any) -> str:
    """TensorProperties pickles itself as a tuple whose first element is the dtype."""
    dtype = properties["state"][0]
    if not isinstance(dtype, Name):
        raise ValueError(f"dtype {dtype!r}")
    return dtype.name


def _chunk(name: str, place: _Place, shape: tuple[int, ...], dtype: str) -> LazyTensor:
    if (store := place.store) is None:
        raise DamagedInput(f"{place.path} is missing, and {name} is in it; copy the checkpoint again")
    if store.size < (needed := place.offset + place.length):
        raise DamagedInput(f"{place.path} is truncated: {store.size} bytes, {needed} needed; copy the checkpoint again")
    nbytes = prod(shape) * itemsize(dtype)
    if place.offset < 0 or place.length < nbytes:
        raise DamagedInput(f"{INDEX} gives {name} {place.length} bytes of {place.path}, {nbytes} are needed")

    @cache
    def look_up() -> LazyTensor:
        start, size = torch_zip.member(Part(place.path, store, place.offset, place.length), "/data/0")
        if size != nbytes:
            raise DamagedInput(f"{name} in {place.path} has {size} bytes, {nbytes} needed; copy it again")
        return stored(store, offset=place.offset + start, shape=shape, dtype=dtype)

    return Deferred(shape, dtype, look_up)
