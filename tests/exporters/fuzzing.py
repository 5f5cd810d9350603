"""Damaged copies of good checkpoints, each opened in this process: `python -m tests.exporters.fuzzing SEED FIRST COUNT
DIRECTORY`, one JSON line a case. A case is its seed and its number, so any can be run again alone.

A case is whatever files of one checkpoint hold beside numbers, with bytes changed, inserted, cut or duplicated. What
must never happen ends the process, with words: another exception than ours, a case that takes too long, more memory
than a checkpoint of this size can need, a file opened outside of the case's directory, anything executed.
"""

from __future__ import annotations

import faulthandler
import gzip
import io
import json
import os
import random
import resource
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemoport.errors import NemoportError
from nemoport.exporters import convert, stream
from nemoport.exporters.inspect import inspect
from nemoport.spec import Plan

from .fixtures import LLAMA, Fixture

SECONDS = 20
"""That a case may take."""
GROWTH = 192 * 2**20
"""Bytes that all cases together may add to the most memory that good checkpoints took."""
SPACE = 6 * 2**30
"""Bytes of address space: what asks for a multiple of it fails at once, and not with one of our errors."""
_EXECUTES = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "pickle.find_class",
    "socket.connect",
)
_NUMBERS = (b"0", b"-1", b"1", b"7", b"99999999999", b"4294967296", b"1e999", b"NaN", b"null", b"[]", b'"x"', b"{}")
_EXTREMES = tuple(number.to_bytes(8, "little") for number in (0, 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1))


def main(seed: str, first: int, count: int, directory: Path) -> None:
    directory = directory.resolve()
    os.fsync = _unsynced  # thousands of files, none of which is kept
    good = checkpoints(directory / "good")
    allowed = [
        directory,
        Path(sys.prefix),
        Path(sys.base_prefix),
        Path(__file__).parents[2] / "nemoport",
        Path("/proc"),
    ]
    expected: dict[str, dict[str, str]] = {}
    for name, fixture in good.items():
        inspect(fixture.path, fixture.config)
        expected[name] = _converted(fixture.path, fixture.config, directory / "out")
    _forbid([str(each) for each in allowed])
    before = _peak()
    resource.setrlimit(resource.RLIMIT_AS, (SPACE, SPACE))
    for number in range(first, first + count):
        bits = random.Random(f"{seed}/{number}")
        name = bits.choice(sorted(good))
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        case = {"case": number, "checkpoint": name, **_case(good[name], bits, directory, expected[name])}
        faulthandler.cancel_dump_traceback_later()
        sys.stdout.write(json.dumps(case) + "\n")
        sys.stdout.flush()
        if (grown := _peak() - before) > GROWTH:
            raise SystemExit(f"case {number} of {name} took {grown >> 20} MiB more than good checkpoints do")
    for name in sorted(good):  # whatever the damaged ones left behind
        assert _converted(good[name].path, good[name].config, directory / "out") == expected[name], name


def checkpoints(directory: Path) -> dict[str, Fixture]:
    """Every fixture of llama, copied, with two forms that none of them has."""
    found = {}
    for number, (name, fixture) in enumerate(LLAMA.items()):
        root, below = (fixture.path.parent, fixture.path.name) if fixture.path.name == "weights" else (fixture.path, "")
        place = directory / str(number) / root.name
        place.parent.mkdir(parents=True)
        (shutil.copytree if root.is_dir() else shutil.copy)(root, place)
        config = fixture.config_file and Path(shutil.copy(fixture.config_file, place.parent))
        found[name] = Fixture(place / below, fixture.format, fixture.rows, config)
    nemo = found["nemo1"]
    packed = directory / "gzip" / "model.nemo"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(nemo.path.read_bytes(), 1, mtime=0))
    found["nemo1, gzip"] = Fixture(packed, "nemo1", nemo.rows)
    sharded = directory / "sharded" / "model"
    shutil.copytree(found["huggingface"].path, sharded)
    _shard(sharded)
    found["huggingface, sharded"] = Fixture(sharded, "huggingface", found["huggingface"].rows)
    return found


def _shard(directory: Path) -> None:
    """Two files and an index instead of one."""
    whole = directory / "model.safetensors"
    content = whole.read_bytes()
    whole.unlink()
    start = 8 + int.from_bytes(content[:8], "little")
    header = {name: entry for name, entry in json.loads(content[8:start]).items() if name != "__metadata__"}
    where = {}
    for shard in range(2):
        kept, numbers = {}, b""
        for name in sorted(header)[shard::2]:
            low, high = header[name]["data_offsets"]
            offsets = [len(numbers), len(numbers) + high - low]
            numbers += content[start + low : start + high]
            kept[name] = {**header[name], "data_offsets": offsets}
            where[name] = f"model-{shard + 1:05d}-of-00002.safetensors"
        text = json.dumps(kept).encode()
        (directory / f"model-{shard + 1:05d}-of-00002.safetensors").write_bytes(
            len(text).to_bytes(8, "little") + text + numbers
        )
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def _case(fixture: Fixture, bits: random.Random, directory: Path, expected: dict[str, str]) -> dict[str, Any]:
    root = fixture.path.parent if fixture.path.name == "weights" else fixture.path
    copy = directory / "case" / root.name
    shutil.rmtree(copy.parent, ignore_errors=True)
    copy.parent.mkdir()
    if root.is_dir():
        shutil.copytree(root, copy, copy_function=os.link)
        path = copy / fixture.path.relative_to(root)
        file = bits.choice(sorted(each for each in copy.rglob("*") if each.is_file() and _holds_more(each)))
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(damaged(content, file.name, bits))
        what = file.relative_to(copy).as_posix()
    else:
        content, what = _damaged_tar(root.read_bytes(), bits)
        copy.write_bytes(content)
        path = copy
    return {"file": what, "outcome": _outcome(path, fixture, directory / "out", expected)}


def _outcome(path: Path, fixture: Fixture, out: Path, expected: dict[str, str]) -> str:
    """`refused 3`, `refused 5`, `refused 2` where a config is asked for, `equal`, or `other` numbers or words."""
    try:
        inspect(path, fixture.config)
        found = _converted(path, fixture.config, out)
    except NemoportError as error:
        refusal = error
    else:
        return "equal" if found == expected else "other"
    asked = refusal.exit_code == 2 and "--" in str(refusal)
    assert refusal.exit_code in (3, 5) or asked, repr(refusal)
    assert "\n" not in str(refusal), repr(refusal)
    return f"refused {refusal.exit_code}"


def _converted(path: Path, config: Any, out: Path) -> dict[str, str]:
    """What the command writes, file by file; nothing stays."""
    job = convert.plan(path, "hf", out, config=config, plan=Plan())
    try:
        done = stream.run(job)
        return {file.path: str(file.blake3) for file in done.files if file.path != "manifest.json"}
    finally:
        shutil.rmtree(out, ignore_errors=True)
        assert not out.with_name(f".{out.name}.partial").exists()


def _holds_more(path: Path) -> bool:
    """Than numbers: not a chunk of zarr."""
    return path.name == ".zarray" or not (path.parent / ".zarray").exists()


def _damaged_tar(content: bytes, bits: random.Random) -> tuple[bytes, str]:
    """The headers, the stream, or a file inside, packed again."""
    packed = content[:2] == b"\x1f\x8b"
    if packed and bits.random() < 0.3:
        return damaged(content, "gzip", bits), "the gzip stream"
    plain = gzip.decompress(content) if packed else content
    with tarfile.open(fileobj=io.BytesIO(plain)) as tar:
        members = [member for member in tar.getmembers() if member.isfile()]
        if bits.random() < 0.4:
            what, at = "a tar header", bits.choice(members).offset
            header = bytearray(damaged(plain[at : at + 512], "tar", bits))
            if len(header) == 512 and bits.random() < 0.7:  # one whose checksum holds
                header[148:156] = b" " * 8
                header[148:156] = b"%06o\0 " % sum(header)
            found = plain[:at] + bytes(header) + plain[at + 512 :]
        else:
            chosen = bits.choice(members)
            what, out = chosen.name, io.BytesIO()
            with tarfile.open(fileobj=out, mode="w") as again:
                for member in members:
                    stored = tar.extractfile(member)
                    assert stored is not None
                    inside = stored.read()
                    if member is chosen:
                        inside = damaged(inside, member.name, bits)
                        member.size = len(inside)
                    again.addfile(member, io.BytesIO(inside))
            found = out.getvalue()
    return (gzip.compress(found, 1, mtime=0) if packed else found), what


def damaged(content: bytes, name: str, bits: random.Random) -> bytes:
    """Changed in one to eight places, where its structure is rather than its numbers."""
    if not content:
        return bits.randbytes(9)
    if name.endswith((".pt", ".ckpt")) and bits.random() < 0.5:
        return _packed_again(content, bits)
    found = bytearray(content)
    for _ in range(bits.choice((1, 1, 1, 2, 3, 8))):
        at = min(_place(found, name, bits), len(found))
        length = bits.choice((1, 2, 4, 8, 16, 64, 512))
        if content[:1] == b"\x80" and bits.random() < 0.6:
            found = _other_number(found, at, bits)
            continue
        match bits.randrange(9):
            case 0 if at < len(found):
                found[at] ^= 1 << bits.randrange(8)
            case 1 if at < len(found):
                found[at] = bits.randrange(256)
            case 2:
                del found[at : at + length]
            case 3:
                found[at:at] = bits.randbytes(length)
            case 4:
                found[at:at] = found[at : at + length]
            case 5:
                del found[at:]
            case 6:
                extreme = bits.choice(_EXTREMES)[: bits.choice((2, 4, 8))]
                found[at : at + len(extreme)] = extreme
            case 7:
                found = _renumbered(found, at, bits)
            case _:
                other = _place(found, name, bits)
                found[at : at + length] = found[other : other + length]
    return bytes(found)


def _packed_again(content: bytes, bits: random.Random) -> bytes:
    """An archive of torch.save, its pickle damaged or a member lost, doubled or named otherwise. Its sums are right."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(out, "w") as again:
        names = archive.namelist()
        chosen = (
            next(name for name in names if name.endswith("data.pkl")) if bits.random() < 0.7 else bits.choice(names)
        )
        for name in names:
            inside = archive.read(name)
            if name == chosen and name.endswith("data.pkl"):
                inside = damaged(inside, "pickle", bits)
            elif name == chosen:
                inside, name = bits.choice(((inside[:-1], name), (inside * 2, name), (inside, f"{name}.0")))
            again.writestr(name, inside)
    return out.getvalue()


def _other_number(content: bytearray, at: int, bits: random.Random) -> bytearray:
    """The next number of a pickle, of one, two or four bytes, is another."""
    widths = {ord("K"): 1, ord("M"): 2, ord("J"): 4}
    start = next((place for place in range(at, len(content)) if content[place] in widths), None)
    if start is not None:
        width = widths[content[start]]
        number = bits.choice((bytes(width), b"\1" + bytes(width - 1), b"\xff" * width, bits.randbytes(width)))
        content[start + 1 : start + 1 + width] = number
    return content


def _place(content: bytearray, name: str, bits: random.Random) -> int:
    """A byte; of archives and of files of tensors, mostly one of a header or a directory."""
    size = len(content)
    where = bits.random()
    if name.endswith(".safetensors"):
        return bits.randrange(min(size + 1, 8192))
    if name.endswith((".distcp", ".pt", ".ckpt")) and where < 0.9:
        signatures = [
            at for mark in (b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x06") for at in _all(content, mark)
        ]
        if signatures and where < 0.5:
            return bits.choice(signatures) + bits.randrange(64)
        pickles = list(_all(content, b"data.pkl"))
        return (bits.choice(pickles) if pickles else 0) + bits.randrange(2048)
    return bits.randrange(size + 1)


def _all(content: bytearray, mark: bytes) -> Iterator[int]:
    at = content.find(mark)
    while at >= 0:
        yield at
        at = content.find(mark, at + 1)


def _renumbered(content: bytearray, at: int, bits: random.Random) -> bytearray:
    """The next number in digits, replaced."""
    start = next((place for place in range(at, len(content)) if content[place : place + 1].isdigit()), None)
    if start is None:
        return content
    end = start
    while content[end : end + 1].isdigit():
        end += 1
    return content[:start] + bits.choice(_NUMBERS) + content[end:]


def _forbid(allowed: list[str]) -> None:
    """From now on, opening a file elsewhere or executing anything ends the process."""

    def watch(event: str, found: tuple[Any, ...]) -> None:
        if event in _EXECUTES:
            _end(f"{event} {found!r}")
        if event == "open" and isinstance(found[0], str | bytes | os.PathLike):
            name = os.fsdecode(found[0])
            if "/" not in name:  # shutil's, of a directory that is open
                return
            path = os.path.realpath(name)
            if path == os.path.realpath(__file__):  # a traceback's lines
                return
            if not any(path == root or path.startswith(f"{root}/") for root in allowed):
                _end(f"{path} was opened")

    sys.addaudithook(watch)


def _end(said: str) -> None:
    """Not by an exception, which could be caught."""
    sys.stderr.write(f"FORBIDDEN: {said}\n")
    sys.stderr.flush()
    os._exit(70)


def _unsynced(fd: object) -> None:
    pass


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
