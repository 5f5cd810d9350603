"""Archives read in place: the same bytes as unpacked, in bounded memory, whatever the headers say."""

from __future__ import annotations

import gzip
import io
import os
import random
import subprocess
import sys
import tarfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Literal

import pytest

from nemoport.errors import DamagedInput, NemoportError, PolicyError
from nemoport.exporters.formats import tar, tree
from nemoport.exporters.formats.tree import Gunzipped, archive, is_archive, peek
from nemoport.exporters.tensor import Files

ROUNDS = int(os.environ.get("NEMOPORT_SOAK_ROUNDS", "4")) * 25


@pytest.fixture(scope="module")
def noise() -> bytes:
    """9 MB, in part compressible."""
    bits = random.Random(3)
    return b"".join(bits.randbytes(40_000) + bytes(bits.randrange(90_000)) for _ in range(110))


@pytest.mark.parametrize("point, points", [(2**20, 256), (2**18, 4)], ids=["many points", "few points"])
def test_any_range_of_a_gzip_stream_is_that_of_the_whole(
    point: int, points: int, noise: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree, "POINT", point)
    monkeypatch.setattr(tree, "POINTS", points)
    path = tmp_path / "noise.gz"
    path.write_bytes(gzip.compress(noise[:3_000_000], 1) + gzip.compress(noise[3_000_000:], 6))
    store = Gunzipped(path)
    assert store.size == len(noise)
    assert 2 <= len(store._points) <= points
    bits = random.Random(4)
    for _ in range(60):
        start = bits.randrange(len(noise))
        stop = min(len(noise), start + bits.choice((0, 1, 512, 10_000, 3_000_000)))
        assert bytes(store.view(start, stop)) == noise[start:stop]
    assert bytes(store.view(0, len(noise))) == noise
    with pytest.raises(DamagedInput, match="ends early"):
        store.view(len(noise) - 1, len(noise) + 1)


def test_a_stream_read_in_order_is_unpacked_once(noise: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "noise.gz"
    path.write_bytes(gzip.compress(noise, 1))
    store = Gunzipped(path)
    unpacked = 0
    advance = tree._Cursor.advance

    def counted(cursor: tree._Cursor, file: io.BufferedReader) -> bool:
        nonlocal unpacked
        found = advance(cursor, file)
        unpacked += len(cursor.chunk)
        return found

    monkeypatch.setattr(tree._Cursor, "advance", counted)
    half = len(noise) // 2
    for at in range(0, half - 5000, 5000):  # two tensors at once, as two threads do
        store.view(at, at + 5000)
        store.view(half + at, half + at + 5000)
    assert unpacked < 1.7 * len(noise)


def test_slices_of_a_large_gzip_tar_take_little_memory(tmp_path: Path) -> None:
    """Two members of 300 MB each that compress a thousandfold, in a process of its own."""
    path = tmp_path / "large.nemo"
    compressor = zlib.compressobj(1, wbits=31)
    with path.open("wb") as file:
        for name in ("a", "b"):
            info = tarfile.TarInfo(name)
            info.size = 300 * 2**20
            file.write(compressor.compress(info.tobuf()))
            for _ in range(300):
                file.write(compressor.compress(bytes(2**20)))
        file.write(compressor.compress(bytes(1024)) + compressor.flush())
    program = (
        "import resource, sys; from pathlib import Path; from nemoport.exporters.formats.tree import archive\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"files = archive(Path({str(path)!r}))\n"
        "for start in (299 * 2**20, 5, 123_456_789): files.file('b').view(start, start + 4096)\n"
        "for start in range(0, 2**26, 2**22): files.file('a').view(start, start + 2**22)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    kibibytes = int(found.stdout)
    assert kibibytes < 40 * 1024, f"{kibibytes / 1024:.0f} MiB"


@pytest.mark.parametrize("format_", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_a_tar_is_listed_as_tarfile_lists_it(format_: int, tmp_path: Path) -> None:
    (tmp_path / "deep" / ("d" * 90)).mkdir(parents=True)
    long = "l" * 120 if format_ != tarfile.USTAR_FORMAT else "l" * 60
    names = ["b", "a" * 99, "empty", f"deep/{'d' * 90}/{long}"]
    names += ["naïve"] if format_ != tarfile.USTAR_FORMAT else []
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(b"" if name == "empty" else bytes([number]) * (500 + 12 * number))
    os.symlink("b", tmp_path / "link")
    os.link(tmp_path / "b", tmp_path / "a_hard_link")
    path = tmp_path.with_suffix(".tar")
    with tarfile.open(path, "w", format=format_) as packed:
        packed.add(tmp_path, ".")
    found = archive(path)
    with tarfile.open(path) as packed:
        expected = {member.name.removeprefix("./"): member for member in packed if member.isreg()}
        assert set(found.names()) == set(expected)
        assert {"link", "b"} - set(found.names())  # links, one of them hard, are no files
        for name, member in expected.items():
            store, content = found.file(name), packed.extractfile(member)
            assert store is not None
            assert content is not None
            assert bytes(store.view(0, store.size)) == content.read()


@pytest.mark.parametrize("format_", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_beyond_8_gib_have_their_size(format_: Literal[1, 2], tmp_path: Path) -> None:
    info, path = tarfile.TarInfo("large"), tmp_path / "large.tar"
    info.size = 20 * 2**30 + 5
    header = info.tobuf(format_)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + info.size + 507 + 1024)
    assert list(tar.members(Files().store(path))) == [tar.Member("large", len(header), info.size)]


def _header(size: bytes, kind: bytes = b"0", name: bytes = b"name") -> bytes:
    header = bytearray(512)
    header[: len(name)] = name
    header[124 : 124 + len(size)] = size
    header[156:157] = kind
    header[257:263] = b"ustar\0"
    header[148:156] = b" " * 8
    header[148:155] = b"%06o\0" % sum(header)
    return bytes(header)


@pytest.mark.parametrize(
    "content",
    [
        _header(b"77777777777\0"),
        _header(b"\x80" + (2**62).to_bytes(11, "big")),
        _header(b"\xff" * 12),
        _header(b"-0000000010\0"),
        _header(b"0o_7       "),
        _header(b"00000001000\0", b"S"),
        _header(b"77777777777\0", b"x"),
        _header(b"77777777777\0", b"L"),
        _header(b"00004000001\0", b"L") + bytes(2**20 + 512),
        _header(b"00000000013\0", b"x") + b"11 size=-9\n".ljust(512, b"\0") + _header(b"00000000000\0"),
        _header(b"00000000013\0", b"x") + b"11 size=99\n".ljust(512, b"\0") + _header(b"00000000000\0"),
        _header(b"00000000013\0", b"x") + b"0 path=abc\n".ljust(512, b"\0"),
        _header(b"00000000013\0", b"x") + b"99 path=ab\n".ljust(512, b"\0"),
        _header(b"00000000013\0", b"g") + b"11 path=ab\n".ljust(512, b"\0"),
        _header(b"00000000030\0", b"x") + b"24 GNU.sparse.major=1 a\n".ljust(512, b"\0") + _header(b"00000000000\0"),
        _header(b"00000000000\0")[:300],
        _header(b"00000000000\0").replace(b"name", b"maim"),
    ],
)
def test_headers_that_ask_for_too_much_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.tar"
    path.write_bytes(content)
    with pytest.raises(DamagedInput):
        archive(path)


def test_a_long_name_cannot_leave_the_archive(tmp_path: Path) -> None:
    path = tmp_path / "model.tar"
    for kind, extension in ((b"L", b"../../evil\0"), (b"x", b"19 path=../../evil\n")):
        path.write_bytes(
            _header(b"%011o\0" % len(extension), kind) + extension.ljust(512, b"\0") + _header(b"00000000000\0")
        )
        with pytest.raises(PolicyError, match="leaves the archive"):
            archive(path)


@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_damaged_headers_are_read_or_refused(compress: object, tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as packed:
        for name in ("a", "b" * 130, "ü"):
            info = tarfile.TarInfo(name)
            info.size = 700
            packed.addfile(info, io.BytesIO(bytes(700)))
    whole = out.getvalue()
    assert callable(compress)
    bits, path = random.Random(5), tmp_path / "model.nemo"
    for _ in range(ROUNDS):
        content = bytearray(whole)
        for _ in range(bits.choice((1, 1, 3))):
            at = bits.randrange(0, len(content), 512) + bits.choice((0, 5, 126, 135, 150, 156, 260, 345, 400))
            content[at % len(content)] = bits.randrange(256)
        packed_content = bytearray(compress(bytes(content)))
        if compress is not bytes:
            packed_content[bits.randrange(len(packed_content))] ^= 1 << bits.randrange(8)
        path.write_bytes(packed_content[: bits.choice((len(packed_content), bits.randrange(len(packed_content))))])
        names: tuple[str, ...] = ()
        with suppress(NemoportError):
            names = archive(path).names()
        assert not any(".." in name.split("/") for name in names)


def test_what_is_no_archive_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"\x1f\x8b")
    (tmp_path / "empty").write_bytes(b"")
    assert is_archive(tmp_path / "short")
    assert peek(tmp_path / "short", 100) == b""
    for path in (tmp_path, tmp_path / "missing", tmp_path / "empty"):
        assert not is_archive(path)
        assert peek(path, 100) == b""


def test_the_head_of_a_tar_tells_its_config() -> None:
    head = _header(b"00000000000\0", name=b"a") + _header(b"00000000000\0", name=b"./model_config.yaml")
    assert tar.heads(head, "model_config.yaml")
    assert not tar.heads(head[:600], "model_config.yaml")
    assert not tar.heads(head, "other.yaml")


def test_an_empty_file_can_be_viewed(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    assert tree.content(Files().store(tmp_path / "empty"), 10) == b""
