"""Tar archives, listed and never extracted: where the bytes of each regular file lie.

The headers of POSIX (ustar and pax) and GNU tars are read here, not by `tarfile`, which trusts the sizes they claim:
every step moves forward, and what is held is bounded. Sources: POSIX pax, "ustar Interchange Format"; GNU tar's manual,
"Basic Tar Format".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from nemoport.errors import DamagedInput, PolicyError
from nemoport.exporters.tensor import Store

BLOCK = 512
LARGEST_EXTENSION = 2**20
"""Bytes of a long name or of a header's pax records."""
MOST_MEMBERS = 4_000_000

_REGULAR = (b"0", b"\0", b"7")
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")
"""Links, devices, directories, pipes: whatever size they claim."""


@dataclass(frozen=True)
class Member:
    name: str
    """Without a leading `./`."""
    start: int
    size: int


def members(store: Store) -> Iterator[Member]:
    """The regular files, in order. A path that leaves the archive is refused; links are no files."""
    position, count = 0, 0
    long_name: str | None = None
    records: dict[str, str] = {}
    while position < store.size:
        header = _read(store, position, BLOCK)
        if not any(header):
            return
        if (count := count + 1) > MOST_MEMBERS:
            raise DamagedInput(f"{store.name} has more than {MOST_MEMBERS:,} members; it is damaged")
        size, kind, start = _size(store, header, position), header[156:157], position + BLOCK
        if kind in (b"L", b"K", b"x", b"g"):
            extension = _extension(store, start, size)
            if kind == b"L":
                long_name = extension.rstrip(b"\0").decode("utf-8", "backslashreplace")
            elif kind == b"x":
                records = _records(store, extension)
            elif kind == b"g" and _records(store, extension).keys() & {"path", "size"}:
                raise DamagedInput(f"{store.name} gives all its members one name or size; pack it again")
        else:
            size = _number(store, records.get("size", str(size)).encode(), 10)
            name = records.get("path") or long_name or _name(header)
            parts = _parts(store, name)
            if kind == b"S" or any(key.startswith("GNU.sparse") for key in records):
                raise DamagedInput(f"{store.name} holds {name!r} as a sparse file; pack it again without holes")
            if kind in _WITHOUT_DATA or name.endswith("/"):
                size = 0
            if start + size > store.size:
                raise DamagedInput(f"{store.name} is truncated: {name!r} ends beyond it; copy it again")
            if kind in _REGULAR and not name.endswith("/"):
                yield Member("/".join(parts), start, size)
            long_name, records = None, {}
        position = start + -(-size // BLOCK) * BLOCK


def heads(head: bytes, name: str) -> bool:
    """Whether the first bytes of a tar hold the header of a file of that name at its top. Never an error."""
    wanted = (name.encode() + b"\0", b"./" + name.encode() + b"\0")
    return any(
        head.startswith(wanted, at) and head[at + 257 : at + 262] == b"ustar" for at in range(0, len(head), BLOCK)
    )


def _read(store: Store, start: int, size: int) -> bytes:
    if start + size > store.size:
        raise DamagedInput(f"{store.name} is a truncated tar: {store.size} bytes; copy it again")
    return bytes(store.view(start, start + size))


def _extension(store: Store, start: int, size: int) -> bytes:
    if size > LARGEST_EXTENSION:
        raise DamagedInput(f"{store.name} describes a member in {size} bytes, more than a name needs; it is damaged")
    return _read(store, start, size)


def _size(store: Store, header: bytes, position: int) -> int:
    """Of the data after a header, once its checksum holds."""
    summed = sum(header[:148]) + sum(b" " * 8) + sum(header[156:])
    if summed != _number(store, header[148:156], 8):
        raise DamagedInput(f"{store.name} has a damaged tar header at byte {position}; copy it again")
    field = header[124:136]
    if field[0] == 0x80:  # GNU's binary numbers, for sizes from 8 GiB
        return int.from_bytes(field[1:], "big")
    return _number(store, field, 8)


def _number(store: Store, digits: bytes, base: int) -> int:
    """A number in ASCII digits, padded with blanks or zeros."""
    bare = digits.strip(b" \0")
    if len(bare) > 20 or not (bare or b"0").isdigit():
        raise DamagedInput(f"{store.name} has a damaged tar header, with {bare[:20]!r} for a number; copy it again")
    try:
        return int(bare or b"0", base)
    except ValueError as error:
        raise DamagedInput(f"{store.name} has a damaged tar header ({error}); copy it again") from error


def _records(store: Store, extension: bytes) -> dict[str, str]:
    """pax: lines of `LENGTH KEY=VALUE`, the length counting the whole line."""
    found, at = {}, 0
    while at < len(extension):
        digits, _, _ = extension[at : at + 8].partition(b" ")
        length = _number(store, digits, 10)
        key, equals, value = extension[at + len(digits) + 1 : at + length].partition(b"=")
        if length <= len(digits) or at + length > len(extension) or not equals:
            raise DamagedInput(f"{store.name} has a damaged pax header; copy it again")
        found[key.decode("utf-8", "backslashreplace")] = value.removesuffix(b"\n").decode("utf-8", "backslashreplace")
        at += length
    return found


def _name(header: bytes) -> str:
    name, prefix = (field.partition(b"\0")[0] for field in (header[:100], header[345:500]))
    if prefix and header[257:263] == b"ustar\0":
        name = prefix + b"/" + name
    return name.decode("utf-8", "backslashreplace")


def _parts(store: Store, name: str) -> tuple[str, ...]:
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts:
        raise PolicyError(f"{store.name} holds {name[:200]!r}, which leaves the archive; refuse this file")
    return parts
