"""What is said of versions: a row for each of them, and what differs between two."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemoport import artifact
from nemoport.artifact import Artifact, Signature
from nemoport.errors import UsageError
from nemoport.repository import config, gate
from nemoport.repository.versions import State, evidence_of, number_of, state
from nemoport.spec import to_json


@dataclass(frozen=True)
class Difference:
    about: str
    """config, signature, size, model, plan, accuracy or source."""
    what: str
    a: Any
    b: Any


def rows(repository: Path, name: str) -> list[dict[str, Any]]:
    """A model's versions, for a table or JSON."""
    known = state(repository, name)
    return [_row(repository, known, version) for version in known.every]


def diff(repository: Path, name: str, a: str, b: str) -> list[Difference]:
    """Two versions, whose files may be gone: only their evidence is needed."""
    first, second = (_facts(repository, name, number_of(version)) for version in (a, b))
    keys = [*first, *(key for key in second if key not in first)]
    return [Difference(*key, first.get(key), second.get(key)) for key in keys if first.get(key) != second.get(key)]


def _row(repository: Path, known: State, version: int) -> dict[str, Any]:
    evidence = evidence_of(repository, known.name) / str(version)
    verdict = gate.verdict_of(evidence)
    row = {
        "model": known.name,
        "version": version,
        "state": "live" if version in known.live else "staged" if version in known.staged else "not served",
        "labels": known.names(version),
        "verdict": "none" if verdict is None else "green" if verdict.get("passed") is True else "red",
    }
    if not (evidence / artifact.MANIFEST).is_file():
        return row | {"kind": None, "dtype": None, "bytes": None}
    made = artifact.read_manifest(evidence)
    return row | {"kind": made.kind, "dtype": made.dtype, "bytes": _size(made)}


def _facts(repository: Path, name: str, version: int) -> dict[tuple[str, str], Any]:
    evidence = evidence_of(repository, name) / str(version)
    if not (evidence / artifact.MANIFEST).is_file():
        state(repository, name)
        raise UsageError(f"{name} in {repository} never had a version {version} that nemoport published")
    made, verdict = artifact.read_manifest(evidence), gate.verdict_of(evidence) or {}
    wanted = config.from_artifact(made, name, version)
    facts = {("config", field): value for field, value in _flat(asdict(wanted)) if not field.startswith("versions")}
    facts |= {("signature", tensor): text for tensor, text in _signature(made.signature)}
    facts |= {("size", "bytes"): _size(made)} | {("size", file.path): file.size for file in made.files}
    facts |= {("model", field): value for field, value in _flat(to_json(made.spec))}
    facts |= {("plan", field): value for field, value in _flat({"dtype": made.dtype, **to_json(made.plan)})}
    facts |= {("source", field): value for field, value in _flat(dict(made.source))}
    facts |= {("accuracy", "verdict"): verdict.get("passed")}
    return facts | {("accuracy", check["name"]): check.get("found") for check in verdict.get("checks", [])}


def _signature(signature: Signature | None) -> Iterator[tuple[str, str]]:
    for word, tensors in (("input", signature.inputs), ("output", signature.outputs)) if signature else ():
        for tensor in tensors:
            yield f"{word} {tensor.name}", f"{tensor.dtype} [{', '.join(map(str, tensor.shape))}]"


def _flat(data: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves by their path: blocks.0.ffn.intermediate."""
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(data, list | tuple) and data and isinstance(data[0], Mapping):
        for number, value in enumerate(data):
            yield from _flat(value, f"{prefix}.{number}")
    else:
        yield prefix, list(data) if isinstance(data, tuple) else data


def _size(made: Artifact) -> int:
    return sum(file.size for file in made.files)
