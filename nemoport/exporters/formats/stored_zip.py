"""A ZIP whose members lie stored, one after the other, so that every place is known before a tensor is read.

    local header, content     of small members, whose bytes are given: the file's `header`
    local header, content     of each tensor, which begins at a multiple of 64
    directory                 of all of them

The CRC-32 in the headers of tensors and in the directory are those of bytes that are not there yet, so both are written
when the tensors are. Sources: APPNOTE.TXT, 4.3.7 to 4.3.16 and 4.5.3 (Zip64); the extra field `FB`, which pads, and 64
are PyTorch's (caffe2/serialize/inline_container.cc).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from zlib import crc32

from nemoport.exporters.checkpoint import Slot, TensorFile
from nemoport.exporters.tensor import nbytes

ALIGNMENT = 64
_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR64 = struct.Struct("<4sIQI")
_FIELD = struct.Struct("<2H")
_ZIP64, _PADDING = 0x0001, int.from_bytes(b"FB", "little")
_MUCH, _MANY = 0xFFFFFFFF, 0xFFFF
"""In fields of 32 and 16 bits: the number stands in a Zip64 field."""
_FIRST_DAY = 1 << 5 | 1
"""1 January 1980: no member has a date."""


@dataclass(frozen=True)
class Member:
    name: bytes
    start: int
    """Of its local header."""
    size: int
    crc: int = 0

    @property
    def content(self) -> int:
        """Where its bytes begin."""
        bare = self.start + _LOCAL.size + len(self.name) + len(self._sizes)
        return -(-(bare + _FIELD.size) // ALIGNMENT) * ALIGNMENT

    @property
    def end(self) -> int:
        return self.content + self.size

    def local(self) -> bytes:
        """All that stands before its bytes."""
        bare = self.start + _LOCAL.size + len(self.name) + len(self._sizes)
        padding = bytes(self.content - bare - _FIELD.size)
        extra = self._sizes + _FIELD.pack(_PADDING, len(padding)) + padding
        size = min(self.size, _MUCH)
        numbers = (self._version, 0, 0, 0, _FIRST_DAY, self.crc, size, size, len(self.name), len(extra))
        return _LOCAL.pack(b"PK\3\4", *numbers) + self.name + extra

    def central(self) -> bytes:
        """Its entry in the directory."""
        start, size = min(self.start, _MUCH), min(self.size, _MUCH)
        extra = _zip64(*([self.size] * 2 if size == _MUCH else []), *([self.start] if start == _MUCH else []))
        times = (0, _FIRST_DAY)
        lengths = (len(self.name), len(extra), 0, 0, 0)
        head = _CENTRAL.pack(
            b"PK\1\2", self._version, self._version, 0, 0, *times, self.crc, size, size, *lengths, 0, start
        )
        return head + self.name + extra

    @property
    def _sizes(self) -> bytes:
        return _zip64(self.size, self.size) if self.size >= _MUCH else b""

    @property
    def _version(self) -> int:
        """Of the format, that is needed to read it: 4.5 knows Zip64."""
        return 45 if self.size >= _MUCH or self.start >= _MUCH else 20


def file(path: str, members: Mapping[str, bytes], slots: Sequence[tuple[str, Slot]]) -> TensorFile:
    """The file that holds these members and after them these tensors, each under the name that goes with it."""
    contents = list(members.values())
    given = _summed(_placed(0, zip(members, map(len, contents), strict=True)), map(crc32, contents))
    header = b"".join(each.local() + content for each, content in zip(given, contents, strict=True))
    waiting = _placed(len(header), ((name, nbytes(slot.tensor)) for name, slot in slots))

    def seal(checksums: Sequence[int]) -> Mapping[int, bytes]:
        written = _summed(waiting, checksums)
        every = [*given, *written]
        return {each.start: each.local() for each in written} | {every[-1].end: _directory(every)}

    return TensorFile(
        path=path,
        header=header,
        slots=tuple(slot for _, slot in slots),
        offsets=tuple(each.content for each in waiting),
        seal=seal,
    )


def _placed(start: int, sizes: Iterable[tuple[str, int]]) -> list[Member]:
    found = []
    for name, size in sizes:
        found.append(Member(name.encode("ascii"), start, size))
        start = found[-1].end
    return found


def _summed(members: Sequence[Member], checksums: Iterable[int]) -> list[Member]:
    return [replace(each, crc=crc) for each, crc in zip(members, checksums, strict=True)]


def _directory(members: Sequence[Member]) -> bytes:
    """The entries of all, and where the first of them stands, twice for those who know Zip64."""
    start, entries = members[-1].end, b"".join(each.central() for each in members)
    count, size = len(members), len(entries)
    end64 = _END64.pack(b"PK\6\6", _END64.size - 12, 45, 45, 0, 0, count, count, size, start)
    locator = _LOCATOR64.pack(b"PK\6\7", 0, start + size, 1)
    few = min(count, _MANY)
    end = _END.pack(b"PK\5\6", 0, 0, few, few, size, min(start, _MUCH), 0)
    return entries + end64 + locator + end


def _zip64(*numbers: int) -> bytes:
    return _FIELD.pack(_ZIP64, 8 * len(numbers)) + struct.pack(f"<{len(numbers)}Q", *numbers) if numbers else b""
