"""Where a checkpoint's files lie: in a directory, or inside a tar that is read in place, gzipped or not.

A `Tree` finds files by name; a file is a `Store`, whose bytes can be viewed or opened as a stream. Tars are listed and
never extracted: a member with a path that leaves the archive is refused, and links are no files.
"""

from __future__ import annotations

import io
import tarfile
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any, Protocol

from nemoport.errors import DamagedInput, PolicyError
from nemoport.exporters.tensor import Buffer, Files, Store

POINT = 16 * 2**20
"""Uncompressed bytes between the places from which a gzip stream can be read again; each costs about 40 KiB."""


class Tree(Protocol):
    @property
    def name(self) -> str: ...

    def file(self, name: str) -> Store | None:
        """The file of that name, with forward slashes, or None where there is none."""
        ...

    def names(self) -> tuple[str, ...]:
        """Of every file, sorted."""
        ...

    def below(self, prefix: str) -> Tree:
        """The directory of that name."""
        ...


@dataclass(frozen=True)
class Directory:
    path: Path
    files: Files = field(default_factory=Files)

    @property
    def name(self) -> str:
        return str(self.path)

    def file(self, name: str) -> Store | None:
        path = self.path / name
        return self.files.store(path) if path.is_file() else None

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(path.relative_to(self.path).as_posix() for path in self.path.rglob("*") if path.is_file()))

    def below(self, prefix: str) -> Tree:
        return Directory(self.path / prefix, self.files)


@dataclass(frozen=True)
class Archive:
    """A tar, or a directory of one."""

    name: str
    members: Mapping[str, Store]

    def file(self, name: str) -> Store | None:
        return self.members.get(name)

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self.members))

    def below(self, prefix: str) -> Tree:
        start = f"{prefix}/"
        inside = {name.removeprefix(start): each for name, each in self.members.items() if name.startswith(start)}
        return Archive(f"{self.name}/{prefix}", inside)


@dataclass(frozen=True)
class Part:
    """A run of bytes of another store: a member of a tar."""

    name: str
    whole: Store
    start: int
    size: int

    def view(self, start: int, stop: int) -> Buffer:
        return self.whole.view(self.start + start, self.start + stop)


def is_archive(path: Path) -> bool:
    """By the first bytes: a tar, or a gzip stream. Never an error."""
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError:
        return False
    return head[257:262] == b"ustar" or head[:2] == b"\x1f\x8b"


def archive(path: Path) -> Archive:
    """The files of a tar, by names without a leading `./`."""
    whole: Store = Files().store(path)
    with path.open("rb") as file:
        if file.read(2) == b"\x1f\x8b":
            whole = Gunzipped(path)
    members: dict[str, Store] = {}
    try:
        with tarfile.open(fileobj=stream(whole), mode="r:") as tar:
            for member in tar:
                parts = PurePosixPath(member.name).parts
                if member.name.startswith("/") or ".." in parts:
                    raise PolicyError(f"{path.name} holds {member.name}, which leaves the archive; refuse this file")
                if member.issparse():
                    raise DamagedInput(f"{path.name} holds {member.name} as a sparse file; pack it again without holes")
                if member.isreg():
                    name = "/".join(part for part in parts if part != ".")
                    members[name] = Part(name, whole, member.offset_data, member.size)
    except (tarfile.TarError, EOFError, ValueError, OSError) as error:
        raise DamagedInput(f"{path.name} is not a readable tar ({error}); copy it again") from error
    if cut := [part for part in members.values() if isinstance(part, Part) and part.start + part.size > whole.size]:
        raise DamagedInput(f"{path.name} is truncated: {cut[0].name} ends beyond it; copy it again")
    return Archive(path.name, members)


def content(store: Store, limit: int) -> bytes:
    """The whole of a small file; a larger one than `limit` bytes is damaged."""
    if store.size > limit:
        raise DamagedInput(f"{store.name} has {store.size} bytes, at most {limit} are expected; it is damaged")
    return bytes(store.view(0, store.size))


def stream(store: Store, start: int = 0, size: int | None = None) -> io.BufferedReader:
    """A range of a store as a seekable file, for libraries that want one."""
    return io.BufferedReader(_Stream(store, start, store.size - start if size is None else size))


class _Stream(io.RawIOBase):
    def __init__(self, store: Store, start: int, size: int) -> None:
        self._store, self._start, self._size, self._position = store, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence] + offset
        if position < 0:
            raise ValueError(f"seek to {position}")
        self._position = position
        return position

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._size - self._position))
        first = self._start + self._position
        buffer[:count] = self._store.view(first, first + count)
        self._position += count
        return count


class Gunzipped:
    """A gzip file as a store: read through once, and then again from the nearest point before what is wanted.

    A point is a copy of the decompressor's state, so no bytes are unpacked to disk. A few ranges that were read last
    are kept, since tensors are read in order.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, Lock()
        self._points: list[tuple[int, int, Any]] = [(0, 0, zlib.decompressobj(wbits=31))]
        self._recent: OrderedDict[int, bytes] = OrderedDict()
        self.size = self._index()

    @property
    def name(self) -> str:
        return self._path.name

    def view(self, start: int, stop: int) -> Buffer:
        with self._lock:
            pieces = []
            while start < stop:
                at = bisect_right(self._points, start, key=lambda point: point[0]) - 1
                segment, begin = self._segment(at), self._points[at][0]
                piece = segment[start - begin : stop - begin]
                if not piece:
                    raise DamagedInput(f"{self.name} ends early; copy it again")
                pieces.append(piece)
                start += len(piece)
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _segment(self, at: int) -> bytes:
        """The bytes from one point to the next."""
        if at not in self._recent:
            begin, compressed, state = self._points[at]
            end = self._points[at + 1][0] if at + 1 < len(self._points) else self.size
            decompressor = state.copy()
            out = bytearray()
            with self._path.open("rb") as file:
                file.seek(compressed)
                while len(out) < end - begin and (more := _more(decompressor, file, self.name)):
                    out += more
            while len(self._recent) >= 4:
                self._recent.popitem(last=False)
            self._recent[at] = bytes(out[: end - begin])
        self._recent.move_to_end(at)
        return self._recent[at]

    def _index(self) -> int:
        """Read through once, leaving points; the uncompressed size."""
        decompressor, position = self._points[0][2].copy(), 0
        with self._path.open("rb") as file:
            while not decompressor.eof:
                if position - self._points[-1][0] >= POINT:
                    self._points.append((position, file.tell(), decompressor.copy()))
                position += len(_more(decompressor, file, self.name))
        return position


def _more(decompressor: Any, file: io.BufferedReader, name: str) -> bytes:
    """Some more bytes; none at the end of the stream. Bounded, whatever the compression."""
    while not decompressor.eof:
        pending = decompressor.unconsumed_tail or file.read(64 * 2**10)
        if not pending:
            raise DamagedInput(f"{name} ends in the middle of its gzip stream; copy it again")
        try:
            out: bytes = decompressor.decompress(pending, 2**20)
        except zlib.error as error:
            raise DamagedInput(f"{name} is not readable gzip ({error}); copy it again") from error
        if out:
            return out
    return b""
