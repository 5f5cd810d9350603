"""An artifact: a directory that one stage leaves and another takes, with a manifest of what it is.

    model.onnx, model.onnx.data, rank0.safetensors, config.json ...   what the runtime loads
    ledger.jsonl    one line for each tensor: where it came from, what was done to it, its digest
    manifest.json   kind, model, plan, signature, source, producer, and the size and digest of every file above

The manifest is written last and lists everything that counts; the same inputs give the same bytes. Two more files may
lie in the directory without being part of it: `origin.json` tells this machine where the source checkpoint was, and
`report.json` is the verdict of `validate`.

Digests are BLAKE3, which is as fast as copying: of a whole file, as `b3sum` prints it, or for a file of tensors of its
header and of each tensor, taken while they stream and listed in the ledger, whose own digest the manifest holds.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3

from nemoport import __version__
from nemoport.errors import DamagedInput, UnsupportedInput, UsageError
from nemoport.spec import ModelSpec, Plan, plan_from_json, spec_from_json, to_json

MANIFEST, LEDGER, ORIGIN, REPORT = "manifest.json", "ledger.jsonl", "origin.json", "report.json"
SCHEMA = 1


@dataclass(frozen=True)
class File:
    path: str
    """Relative to the artifact, with forward slashes."""
    size: int
    blake3: str | None
    """None for a file of tensors, whose pieces are in the ledger."""


@dataclass(frozen=True)
class Piece:
    """A part of a tensor file, as the ledger lists it: its header, or one tensor."""

    name: str
    offset: int
    size: int
    blake3: str


@dataclass(frozen=True)
class Tensor:
    """One input or output of an executable artifact. An axis is a number, or the name of what varies."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Signature:
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Artifact:
    kind: str
    """The target that wrote it: hf, trtllm, onnx..."""
    spec: ModelSpec
    plan: Plan
    dtype: str
    files: tuple[File, ...]
    loads: tuple[str, ...]
    """The releases that load it, for people: `TensorRT-LLM 0.8 to 1.2`."""
    source: Mapping[str, Any]
    """What it was made from: format, writer, naming, trained layout. No paths."""
    signature: Signature | None = None
    stages: tuple[Signature, ...] = ()
    """Of each pipeline stage, where they are executed one by one; the files of each lie at `stage_place`."""
    built_with: Mapping[str, Any] = field(default_factory=dict)
    """Of what was compiled: versions and SM of the machine that did, `{"tensorrt_llm": "1.2.1", "sm": 90}`."""
    producer: str = field(default=f"nemoport {__version__}")


def write_manifest(directory: Path, artifact: Artifact) -> None:
    data = {
        "schema": SCHEMA,
        "kind": artifact.kind,
        "producer": artifact.producer,
        "dtype": artifact.dtype,
        "plan": to_json(artifact.plan),
        "loads": artifact.loads,
        "source": artifact.source,
        "signature": asdict(artifact.signature) if artifact.signature else None,
        **({"stages": [asdict(stage) for stage in artifact.stages]} if artifact.stages else {}),
        **({"built_with": dict(artifact.built_with)} if artifact.built_with else {}),
        "files": [asdict(file) for file in sorted(artifact.files, key=lambda file: file.path)],
        "spec": to_json(artifact.spec),
    }
    write_atomically(directory / MANIFEST, json_bytes(data))


def read_manifest(directory: Path) -> Artifact:
    path = directory / MANIFEST
    if not path.is_file():
        raise UnsupportedInput(f"{directory} is no artifact: it has no {MANIFEST}; make one with `nemoport convert`")
    try:
        data = json.loads(path.read_bytes())
        if data["schema"] != SCHEMA:
            raise UnsupportedInput(f"{path} has schema {data['schema']}, this nemoport reads {SCHEMA}; convert again")
        return Artifact(
            kind=data["kind"],
            producer=data["producer"],
            dtype=data["dtype"],
            plan=plan_from_json(data["plan"]),
            loads=tuple(data["loads"]),
            source=data["source"],
            signature=_signature(data["signature"]) if data["signature"] else None,
            stages=tuple(_signature(stage) for stage in data.get("stages", ())),
            built_with=data.get("built_with", {}),
            files=tuple(File(**row) for row in data["files"]),
            spec=spec_from_json(data["spec"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedInput(f"{path} is not a manifest that nemoport wrote ({error}); convert again") from error


def verify(directory: Path, artifact: Artifact, ledger: Path | None = None) -> None:
    """Compare every file with its digests; an error names the first that differs and how many do. `ledger` is given
    where it does not lie with the files; the caller has compared it with the manifest then."""
    tensors = any(file.blake3 is None for file in artifact.files)
    if tensors and ledger is None and not any(file.path == LEDGER and file.blake3 for file in artifact.files):
        raise DamagedInput(f"{directory / MANIFEST} vouches for no {LEDGER}, which vouches for tensors; convert again")
    listed = pieces(ledger or directory / LEDGER) if tensors else {}
    wrong = [reason for file in artifact.files if (reason := _differs(directory / file.path, file, listed))]
    if wrong:
        raise DamagedInput(f"{directory}: {wrong[0]} ({len(wrong)} of {len(artifact.files)} files); convert again")


def pieces(ledger: Path) -> dict[str, list[Piece]]:
    """What the ledger lists of each tensor file."""
    found: dict[str, list[Piece]] = {}
    try:
        for line in ledger.read_bytes().splitlines():
            row = json.loads(line)
            if "file" in row:
                piece = Piece(row.get("target", "header"), row["offset"], row["bytes"], row["blake3"])
                found.setdefault(row["file"], []).append(piece)
    except FileNotFoundError:
        raise DamagedInput(f"{ledger} is missing, and it holds the digests of the tensors; convert again") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedInput(f"{ledger} is not a ledger that nemoport wrote ({error!r}); convert again") from error
    return found


def _differs(path: Path, file: File, listed: Mapping[str, list[Piece]]) -> str | None:
    if not path.is_file():
        return f"{file.path} is missing"
    if (size := path.stat().st_size) != file.size:
        return f"{file.path} has {size} bytes, {file.size} in the manifest"
    if file.blake3 is not None:
        return None if digest(path) == file.blake3 else f"{file.path} differs from its digest"
    if file.path not in listed:
        return f"{file.path} is not in the ledger"
    with path.open("rb") as stream:
        for piece in listed[file.path]:
            if digest_at(stream.fileno(), piece.offset, piece.size) != piece.blake3:
                return f"{piece.name} in {file.path} differs from its digest"
    return None


def digest_at(handle: int, offset: int, size: int) -> str:
    """BLAKE3 of `size` bytes of an open file."""
    hasher = blake3()
    while size and (content := os.pread(handle, min(size, 4 * 2**20), offset)):
        hasher.update(content)
        offset, size = offset + len(content), size - len(content)
    return hasher.hexdigest()


def describe(path: Path, root: Path) -> File:
    """The manifest's row for a file that is complete and not of tensors."""
    return File(path.relative_to(root).as_posix(), path.stat().st_size, digest(path))


def digest(path: Path) -> str:
    """BLAKE3 of a whole file, hexadecimal."""
    hasher = blake3(max_threads=blake3.AUTO)
    if path.stat().st_size:
        hasher.update_mmap(path)
    return hasher.hexdigest()


def identity(directory: Path) -> str:
    """One digest for exactly these bytes: of the manifest, which holds all the others."""
    return digest(directory / MANIFEST)


def json_bytes(data: Any) -> bytes:
    """JSON as every sidecar file is written: indented, keys in the given order, one newline at the end."""
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside, sync, rename: a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)


def link(source: Path, target: Path) -> None:
    """The same bytes under another name, or a copy of them on another disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def check_outside(destination: Path, source: Path, what: str) -> None:
    """Refuse to write into what is read."""
    if source.resolve() in (destination.resolve(), *destination.resolve().parents):
        raise UsageError(f"{destination} lies inside the {what}; choose a directory outside of it with -o")


def sync_directory(path: Path) -> None:
    """Make the names in a directory as durable as the files they point to."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def settle_on_disk(place: Path) -> None:
    """Everything in a directory is on the disk when this returns."""
    for directory, _, files in os.walk(place):
        for file in files:
            with (Path(directory) / file).open("rb") as handle:
                os.fsync(handle.fileno())
        sync_directory(Path(directory))


def stage_place(number: int) -> str:
    """What the paths of a stage's files begin with."""
    return f"stage{number}/"


def _signature(data: Mapping[str, Any]) -> Signature:
    return Signature(
        inputs=tuple(Tensor(row["name"], row["dtype"], tuple(row["shape"])) for row in data["inputs"]),
        outputs=tuple(Tensor(row["name"], row["dtype"], tuple(row["shape"])) for row in data["outputs"]),
    )
