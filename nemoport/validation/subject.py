"""What is validated: an artifact's directory, or a version in a repository."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nemoport.artifact import MANIFEST, ORIGIN, Artifact, read_manifest
from nemoport.errors import DamagedInput, UsageError
from nemoport.repository import config, publish
from nemoport.repository.versions import locate


@dataclass(frozen=True, kw_only=True)
class Subject:
    name: str
    files: Path
    """What the runtime loads."""
    artifact: Artifact
    evidence: Path
    """Where manifest and verdict lie; the artifact itself, or the version's directory beside the repository."""
    model: Path | None = None
    """The model's directory in a repository, whose config is validated along; `files` lies in it."""
    repository: Path | None = None
    """Where a model's fellows are, for an ensemble."""


def of_artifact(directory: Path) -> Subject:
    return Subject(
        name=directory.resolve().name, files=directory, artifact=read_manifest(directory), evidence=directory
    )


def of_repository(repository: Path, model: str, version: str | None) -> Subject:
    found = locate(repository, model, version)
    return Subject(
        name=f"{model} {found.directory}",
        files=found.model / found.directory,
        artifact=read_manifest(found.evidence),
        evidence=found.evidence,
        model=found.model,
        repository=repository,
    )


def verify(subject: Subject) -> None:
    """Compare its files, and the ledger among its evidence, with the manifest."""
    publish.verify(subject.files, subject.evidence, subject.artifact)


@dataclass(frozen=True)
class Origin:
    """Where on this machine an artifact was converted from, the --config and --adapter that were given, and what it was
    calibrated on."""

    path: Path
    config: Mapping[str, Any] | None = None
    adapter: Path | None = None
    calibration: Mapping[str, Any] | None = None


def origin(subject: Subject) -> Origin:
    path = subject.evidence / ORIGIN
    if not path.is_file():
        raise UsageError(f"{subject.name} does not know where it came from; give the checkpoint with --against CKPT")
    try:
        data = json.loads(path.read_bytes())
        adapter = Path(data["adapter"]) if data.get("adapter") else None
        made = Origin(Path(data["path"]), data["config"], adapter, data.get("calibration"))
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedInput(f"{path} is not what convert wrote ({error!r}); use --against CKPT") from error
    for place, option in ((made.path, "--against CKPT"), (made.adapter, "--against CKPT --adapter DIR")):
        if place is not None and not place.exists():
            raise UsageError(f"{subject.name} was converted from {place}, which is gone; use {option}")
    return made


@contextmanager
def in_repository(subject: Subject) -> Iterator[tuple[Path, str]]:
    """The model's directory and the version's name in it, as a runner loads them; for an artifact that is not
    published, a repository of one model for the time being."""
    if subject.model:
        yield subject.model, subject.files.name
        return
    with TemporaryDirectory(prefix="nemoport-") as scratch:
        model = Path(scratch) / "model"
        model.mkdir()
        (model / "1").symlink_to(subject.files.resolve(), target_is_directory=True)
        wanted = config.from_artifact(subject.artifact, model.name, 1, config.MAX_BATCH_SIZE)
        (model / config.FILE).write_text(config.render(wanted))
        yield model, "1"


def is_artifact(path: Path) -> bool:
    return (path / MANIFEST).is_file()
