"""`torch.save` archives: a ZIP of `<stem>/data.pkl` and `<stem>/data/<key>`, all members stored uncompressed.

The pickle says what was saved; the numbers of its tensors are members, read in place. Sources: torch/serialization.py,
and APPNOTE.TXT 4.3.7 for the headers.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from math import prod
from typing import Any

from nemoport.errors import DamagedInput, UnsupportedInput
from nemoport.exporters.dtypes import itemsize, known
from nemoport.exporters.formats.tree import stream
from nemoport.exporters.formats.unpickle import StoredTensor, unpickle
from nemoport.exporters.tensor import Deferred, LazyTensor, Store, stored

LARGEST_PICKLE = 256 * 2**20
"""Bytes. The arguments of a training run and the index of its tensors stay far below."""
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")


def load(store: Store) -> Any:
    """The object that was saved, as inert data; tensors are `StoredTensor`s."""
    with _archive(store) as archive:
        return unpickle(_pickle(archive, store), store.name)


def mentions(store: Store, word: bytes) -> bool:
    """Whether the pickle contains a word, without opening it. Never an error."""
    try:
        with _archive(store) as archive:
            return word in _pickle(archive, store)
    except (DamagedInput, OSError):
        return False


def pickles(store: Store, largest: int) -> Iterator[tuple[str, bytes | None]]:
    """Every pickle of an archive by its place in it, as bytes; None for one that is larger."""
    with _archive(store) as archive:
        for info in archive.infolist():
            if info.filename.endswith(".pkl"):
                place = info.filename.partition("/")[2] or info.filename
                yield place, archive.read(info) if info.file_size <= largest else None


def member(store: Store, name: str) -> tuple[int, int]:
    """Where the one member whose name ends so starts in the store, and its bytes."""
    with _archive(store) as archive:
        found = [info for info in archive.infolist() if info.filename.endswith(name)]
        if len(found) != 1:
            raise DamagedInput(f"{store.name} holds {len(found)} members {name}, one is needed; copy it again")
        return _place(store, found[0])


def tensors(store: Store) -> Callable[[StoredTensor, str], LazyTensor]:
    """How to reach the tensors of what `load` gave; the name is for errors. Their places are looked up when read."""
    with _archive(store) as archive:
        storages = {info.filename.partition("/data/")[2]: info for info in archive.infolist()}

    def reach(tensor: StoredTensor, name: str) -> LazyTensor:
        what = f"{name} in {store.name}"
        storage, shape = tensor.storage, tensor.shape
        if (info := storages.get(getattr(storage, "key", None) or "/")) is None:
            raise DamagedInput(f"{what} has no bytes; copy the checkpoint again")
        width = itemsize(known(storage.dtype, what))
        if not _sane(tensor) or storage.elements * width != info.file_size or info.file_size > store.size:
            raise DamagedInput(
                f"{what} is said to be {str(shape)[:100]} of {storage.elements} {storage.dtype}, its storage has "
                f"{info.file_size} bytes; copy the checkpoint again"
            )
        if not _contiguous(tensor):
            raise UnsupportedInput(
                f"{what} is stored as a view with strides {tensor.stride}; call .contiguous() on it and save it again"
            )

        @cache
        def look_up() -> LazyTensor:
            start, _ = _place(store, info)
            return stored(store, offset=start + tensor.offset * width, shape=shape, dtype=storage.dtype)

        return Deferred(shape, storage.dtype, look_up)

    return reach


def _sane(tensor: StoredTensor) -> bool:
    numbers = (tensor.offset, tensor.storage.elements, *tensor.shape, *tensor.stride)
    return (
        all(type(number) is int and 0 <= number < 2**48 for number in numbers)
        and len(tensor.shape) == len(tensor.stride)
        and tensor.offset + prod(tensor.shape) <= tensor.storage.elements
    )


def _contiguous(tensor: StoredTensor) -> bool:
    """Row-major; the stride of an axis of length one means nothing."""
    step = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride), strict=True):
        if size != 1 and stride != step and 0 not in tensor.shape:
            return False
        step *= size
    return True


def _place(store: Store, info: zipfile.ZipInfo) -> tuple[int, int]:
    """The local header's own lengths count: they differ from the directory's by the padding that aligns the data."""
    header = bytes(store.view(info.header_offset, info.header_offset + _LOCAL_HEADER.size))
    if len(header) < _LOCAL_HEADER.size or info.compress_type != zipfile.ZIP_STORED:
        raise DamagedInput(f"{info.filename} in {store.name} is compressed or cut; torch.save stores it plain")
    signature, *_, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    start: int = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    if signature != b"PK\x03\x04" or start + info.file_size > store.size:
        raise DamagedInput(f"{info.filename} in {store.name} does not lie where its directory says; copy it again")
    return start, info.file_size


def _pickle(archive: zipfile.ZipFile, store: Store) -> bytes:
    found = [info for info in archive.infolist() if info.filename.endswith("/data.pkl")]
    if len(found) != 1 or found[0].file_size > LARGEST_PICKLE:
        sizes = [info.file_size for info in found]
        raise DamagedInput(f"{store.name} holds pickles of {sizes} bytes, one of a sane size is needed; copy it again")
    return archive.read(found[0])


@contextmanager
def _archive(store: Store) -> Iterator[zipfile.ZipFile]:
    try:
        with stream(store) as file, zipfile.ZipFile(file) as archive:
            yield archive
    # zipfile raises all of these on damaged archives.
    except (zipfile.BadZipFile, zipfile.LargeZipFile, RuntimeError, EOFError, ValueError, struct.error) as error:
        raise DamagedInput(f"{store.name} is not a readable torch.save file ({error}); copy it again") from error
