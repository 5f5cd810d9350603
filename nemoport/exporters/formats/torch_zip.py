"""`torch.save` archives: a ZIP of `<stem>/data.pkl` and `<stem>/data/<key>`, all members stored uncompressed.

The pickle says what was saved; the numbers of its tensors are members, read in place. Sources: torch/serialization.py,
and APPNOTE.TXT 4.3.7 for the headers.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nemoport.errors import DamagedInput
from nemoport.exporters.formats.tree import stream
from nemoport.exporters.formats.unpickle import unpickle
from nemoport.exporters.tensor import Store

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


def member(store: Store, name: str) -> tuple[int, int]:
    """Where the one member whose name ends so starts in the store, and its bytes."""
    with _archive(store) as archive:
        found = [info for info in archive.infolist() if info.filename.endswith(name)]
        if len(found) != 1:
            raise DamagedInput(f"{store.name} holds {len(found)} members {name}, one is needed; copy it again")
        return _place(store, found[0])


def members(store: Store) -> dict[str, tuple[int, int]]:
    """The same of every member below `data/`, by key."""
    with _archive(store) as archive:
        inside = [info for info in archive.infolist() if info.filename.split("/")[1:2] == ["data"]]
        return {info.filename.partition("/data/")[2]: _place(store, info) for info in inside}


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
