"""PyTorch's distributed checkpoint format, as Megatron-core's `torch_dist` uses it.

A directory of `.metadata`, a pickled index of chunks, and `__RANK_N.distcp` files of concatenated `torch.save`
archives. The index says where each chunk's archive lies; its numbers are the stored member `<stem>/data/0`, found
through the archive's directory when it is first read, so no second pickle is opened. Sources:
torch/distributed/checkpoint/{metadata,filesystem}.py, and APPNOTE.TXT 4.3.7 for the headers.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from nemoport.errors import DamagedInput
from nemoport.exporters.dtypes import itemsize, known
from nemoport.exporters.formats.unpickle import Name, Record, unpickle
from nemoport.exporters.tensor import Deferred, Files, LazyTensor, Mosaic

INDEX = ".metadata"
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")


@dataclass(frozen=True)
class Contents:
    tensors: Mapping[str, LazyTensor]
    objects: tuple[str, ...]
    """Names of what is stored as pickled bytes: `_extra_state`, RNG states. Never opened."""


def locate(path: Path) -> Path | None:
    """The directory of the index, given it, a run directory, an iteration, or a directory with `weights/`."""
    candidates = [path, path / "weights"]
    tracker = path / "latest_checkpointed_iteration.txt"
    if tracker.is_file() and (word := tracker.read_text(errors="replace").strip()):
        candidates.append(path / (f"iter_{int(word):07d}" if word.isdecimal() and len(word) < 12 else "release"))
    return next((directory for directory in candidates if (directory / INDEX).is_file()), None)


def read(directory: Path) -> Contents:
    """Every tensor of the checkpoint, unread: the whole one, whatever ranks wrote it."""
    index = unpickle((directory / INDEX).read_bytes(), INDEX)
    if not isinstance(index, Record) or not isinstance(index.get("state_dict_metadata"), dict):
        raise DamagedInput(f"{directory / INDEX} is no index of a distributed checkpoint; copy the checkpoint again")
    places = _places(directory, index)
    files = Files()
    tensors: dict[str, LazyTensor] = {}
    objects: list[str] = []
    for name, entry in index["state_dict_metadata"].items():
        if not isinstance(name, str) or not isinstance(entry, Record):
            raise DamagedInput(f"{INDEX} has an entry {name!r} that is no tensor; copy the checkpoint again")
        if "chunks" not in entry:
            objects.append(name)
            continue
        try:
            tensors[name] = _tensor(files, name, entry, places)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise DamagedInput(f"{INDEX} describes {name} in a way torch does not ({error!r})") from error
    return Contents(tensors, tuple(objects))


@dataclass(frozen=True)
class _Place:
    path: Path
    offset: int
    length: int


def _places(directory: Path, index: Record) -> dict[tuple[str, tuple[int, ...]], _Place]:
    """Where each chunk's archive lies, by tensor name and corner."""
    places = {}
    try:
        for key, info in index["storage_data"].items():
            path = directory / info["relative_path"]
            if path.parent.resolve() != directory.resolve():
                raise DamagedInput(
                    f"{INDEX} points outside its directory, to {info['relative_path']}; it was tampered with"
                )
            if info.get("transform_descriptors"):
                raise DamagedInput(
                    f"{path.name} is transformed by {info['transform_descriptors']}, which is not supported"
                )
            corner = tuple(key.get("offset") or ())
            places[key["fqn"], corner] = _Place(path, info["offset"], info["length"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DamagedInput(f"{INDEX} holds no usable storage index ({error!r}); copy the checkpoint again") from error
    return places


def _tensor(files: Files, name: str, entry: Record, places: Mapping[tuple[str, tuple[int, ...]], _Place]) -> LazyTensor:
    shape = _dimensions(entry["size"])
    dtype = known(_dtype(entry["properties"]), name)
    pieces = []
    for chunk in entry["chunks"]:
        corner, sizes = _dimensions(chunk["offsets"]), _dimensions(chunk["sizes"])
        if len(corner) != len(shape) or any(c + s > size for c, s, size in zip(corner, sizes, shape, strict=False)):
            raise DamagedInput(f"{INDEX} has a chunk of {name} at {corner} of {sizes} outside its shape {shape}")
        place = places.get((name, corner)) or places.get((name, ()))
        if place is None:
            raise DamagedInput(f"{INDEX} does not say where the chunk of {name} at {list(corner)} is stored")
        pieces.append((corner, _chunk(files, name, place, sizes, dtype)))
    _check_cover(name, shape, pieces)
    if len(pieces) == 1:
        return pieces[0][1]
    return Mosaic(shape, dtype, tuple(pieces))


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


def _check_cover(name: str, shape: tuple[int, ...], pieces: list[tuple[tuple[int, ...], LazyTensor]]) -> None:
    """Chunks tile the tensor: distinct corners inside it, and volumes that add up."""
    covered, whole = sum(prod(piece.shape) for _, piece in pieces), prod(shape)
    if covered != whole or len({corner for corner, _ in pieces}) != len(pieces):
        raise DamagedInput(f"{INDEX}: the chunks of {name} hold {covered} elements, its shape {list(shape)} {whole}")


def _chunk(files: Files, name: str, place: _Place, shape: tuple[int, ...], dtype: str) -> LazyTensor:
    if not place.path.is_file():
        raise DamagedInput(f"{place.path.name} is missing, and {name} is in it; copy the checkpoint again")
    if (found := place.path.stat().st_size) < (needed := place.offset + place.length):
        raise DamagedInput(f"{place.path.name} is truncated: {found} bytes, {needed} needed; copy the checkpoint again")
    nbytes = prod(shape) * itemsize(dtype)
    if place.offset < 0 or place.length < nbytes:
        raise DamagedInput(f"{INDEX} gives {name} {place.length} bytes of {place.path.name}, {nbytes} are needed")

    @cache
    def look_up() -> LazyTensor:
        start = _numbers(place, nbytes, name)
        return files.array(place.path, offset=start, shape=shape, dtype=dtype)

    return Deferred(shape, dtype, look_up)


def _numbers(place: _Place, nbytes: int, name: str) -> int:
    """Where, in the file, the numbers of a chunk start: its archive's member `data/0`."""
    try:
        with place.path.open("rb") as file, zipfile.ZipFile(_Slice(file, place.offset, place.length)) as archive:
            (member,) = (info for info in archive.infolist() if info.filename.endswith("/data/0"))
            file.seek(place.offset + member.header_offset)
            header = file.read(_LOCAL_HEADER.size)
            signature, *_, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    except (zipfile.BadZipFile, ValueError, struct.error, OSError, RuntimeError, NotImplementedError) as error:
        raise DamagedInput(f"{name} in {place.path.name} is no torch.save archive ({error}); copy it again") from error
    start: int = member.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    stored = signature == b"PK\x03\x04" and member.compress_type == zipfile.ZIP_STORED
    if not stored or member.file_size != nbytes or start + nbytes > place.length:
        raise DamagedInput(f"{name} in {place.path.name} has {member.file_size} bytes, {nbytes} needed; copy it again")
    return place.offset + start


class _Slice(io.RawIOBase):
    """A file's bytes from `offset` on, `length` of them, as a file of their own."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._position = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        if start + offset < 0:
            raise ValueError(f"seek to {start + offset}")
        self._position = start + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._position)
        self._file.seek(self._offset + self._position)
        content = self._file.read(left if size < 0 else min(size, left))
        self._position += len(content)
        return content
