"""Where a checkpoint's files lie: in a directory, or inside a tar that is read in place, gzipped or not.

A `Tree` finds files by name; a file is a `Store`, whose bytes can be viewed or opened as a stream. Tars are listed and
never extracted: a member with a path that leaves the archive is refused, and links are no files.
"""

from __future__ import annotations

import io
import zlib
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

from nemoport.errors import DamagedInput
from nemoport.exporters.formats import tar
from nemoport.exporters.tensor import Buffer, Files, Store

POINT = 4 * 2**20
"""Uncompressed bytes between the first points from which a gzip stream can be read again."""
POINTS = 256
"""At most so many, of about 40 KiB; of longer streams they lie farther apart."""
RECENT = 8
CHUNK = 256 * 2**10
_GZIP = b"\x1f\x8b"


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
    head = _head(path, 512)
    return head[257:262] == b"ustar" or head[:2] == _GZIP


def peek(path: Path, size: int) -> bytes:
    """The first bytes of a file, of a gzip stream the unpacked ones. Never an error."""
    head = _head(path, size)
    if head[:2] != _GZIP:
        return head
    try:
        return zlib.decompressobj(wbits=31).decompress(head, size)
    except zlib.error:
        return b""


def _head(path: Path, size: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(size)
    except OSError:
        return b""


def archive(path: Path) -> Archive:
    """The files of a tar, by names without a leading `./`."""
    whole: Store = Gunzipped(path) if _head(path, 2) == _GZIP else Files().store(path)
    return Archive(path.name, {each.name: Part(each.name, whole, each.start, each.size) for each in tar.members(whole)})


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
    """A gzip file as a store: read through once, and then on from the nearest place before what is wanted.

    Places are copies of the decompressor's state, so no bytes are unpacked to disk: `POINTS` of them over the whole
    file, and those where the last reads ended, since tensors are read in order.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, Lock()
        self._points = [_Cursor(path.name)]
        self._recent: list[_Cursor] = []
        self.size = self._index()

    @property
    def name(self) -> str:
        return self._path.name

    def view(self, start: int, stop: int) -> Buffer:
        out = memoryview(bytearray(max(0, stop - start)))
        with self._lock, self._path.open("rb") as file:
            cursor = self._nearest(start)
            while start < stop:
                while start >= cursor.stop:
                    if not cursor.advance(file):
                        raise DamagedInput(f"{self.name} ends early; copy it again")
                piece = cursor.chunk[start - cursor.start : stop - cursor.start]
                out[len(out) - (stop - start) :][: len(piece)] = piece
                start += len(piece)
        return out

    def _nearest(self, start: int) -> _Cursor:
        """A cursor at or before a position, put among the recent ones."""
        recent = max((each for each in self._recent if each.start <= start), key=_start, default=None)
        point = self._points[bisect_right(self._points, start, key=_start) - 1]
        cursor = recent if recent is not None and recent.start >= point.start else point.copy()
        self._recent = [*(each for each in self._recent if each is not cursor), cursor][-RECENT:]
        return cursor

    def _index(self) -> int:
        """Read through once, leaving points; the uncompressed size."""
        cursor, spacing = self._points[0].copy(), POINT
        with self._path.open("rb") as file:
            while cursor.advance(file):
                if cursor.stop - self._points[-1].stop >= spacing:
                    self._points.append(cursor.copy())
                if len(self._points) > POINTS:
                    self._points, spacing = self._points[::2], 2 * spacing
        return cursor.stop


class _Cursor:
    """A place in a gzip stream, and the bytes just before it."""

    def __init__(self, name: str) -> None:
        self._name, self._state, self._pending = name, _decompressor(), b""
        self._compressed = 0
        self.start, self.chunk = 0, b""

    @property
    def stop(self) -> int:
        return self.start + len(self.chunk)

    def copy(self) -> _Cursor:
        """The same place, without the bytes before it and those read ahead."""
        other = _Cursor(self._name)
        other._state, other.start = self._state.copy(), self.stop
        other._compressed = self._compressed - len(self._pending)
        return other

    def advance(self, file: io.BufferedReader) -> bool:
        """Take the next chunk, of bounded size whatever the compression; False at the end."""
        while True:
            if self._state.eof and not self._next_member(file):
                return False
            self._pending = self._pending or self._read(file)
            if not self._pending:
                raise DamagedInput(f"{self._name} ends in the middle of its gzip stream; copy it again")
            try:
                out: bytes = self._state.decompress(self._pending, CHUNK)
            except zlib.error as error:
                raise DamagedInput(f"{self._name} is not readable gzip ({error}); copy it again") from error
            self._pending = self._state.unused_data if self._state.eof else self._state.unconsumed_tail
            if out:
                self.start, self.chunk = self.stop, out
                return True

    def _next_member(self, file: io.BufferedReader) -> bool:
        """gzip streams may follow one another; anything else after the last is padding."""
        if len(self._pending) < 2:
            self._pending += self._read(file)
        if self._pending[:2] != _GZIP:
            return False
        self._state = _decompressor()
        return True

    def _read(self, file: io.BufferedReader) -> bytes:
        file.seek(self._compressed)
        content = file.read(64 * 2**10)
        self._compressed += len(content)
        return content


def _start(cursor: _Cursor) -> int:
    return cursor.start


def _decompressor() -> Any:
    return zlib.decompressobj(wbits=31)
