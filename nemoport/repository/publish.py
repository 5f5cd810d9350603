"""Publishing: an artifact becomes the next version of a model, staged, where no server sees it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from nemoport import artifact
from nemoport.artifact import Artifact
from nemoport.compatibility import Runtime
from nemoport.errors import DamagedInput, PolicyError, UsageError
from nemoport.repository import config, history, journal, provenance, stamps, values
from nemoport.repository.journal import Move
from nemoport.repository.kinds import kind_of
from nemoport.repository.storage import changing, copy, need_room
from nemoport.repository.versions import (
    STAGED,
    State,
    check_name,
    evidence_of,
    is_live,
    next_version,
    staging_area,
    state,
)

EVIDENCE = (artifact.MANIFEST, artifact.LEDGER, artifact.ORIGIN, artifact.REPORT)
"""What is known of a version, and no server needs."""


@dataclass(frozen=True, kw_only=True)
class Published:
    model: str
    version: int
    path: Path
    """The version's directory: `.../staging-7`, or `.../7` when these bytes were live already."""
    evidence: Path
    already: bool
    """The same bytes were published before; nothing was done."""


def publish(
    directory: Path,
    repository: Path,
    name: str,
    *,
    max_batch_size: int | None = None,
    runtime: Runtime | None = None,
) -> Published:
    """Stage an artifact as the next version. The same bytes twice are the same version, so a command that was killed
    can be repeated. `max_batch_size` and `runtime`, a release of Triton, are for the first version, whose config is the
    model's."""
    check_name(name)
    made = artifact.read_manifest(directory)
    subject = f"{directory} cannot be published as {name}"
    kind_of(made)  # before its releases: one that Triton does not take at all
    first = stamps.for_first(made, runtime, subject)
    said = _values(max_batch_size, first.release)
    wanted = values.generated(said, made, name, (1,))
    check_paths(directory, made)
    artifact.verify(directory, made)
    with changing(repository, name) as scratch:
        known = _state(repository, name)
        if known and (version := _published_as(artifact.identity(directory), repository, known)) is not None:
            _carry_verdict(directory, evidence_of(repository, name) / str(version))
            return _published(repository, known, version, already=True)
        if known:
            _check_config(known, wanted, max_batch_size)
            _check_release(known, made, runtime, subject)
        need_room(repository, sum(file.size for file in made.files))
        version = next_version(repository, name)
        staged, evidence = f"{STAGED}{version}", evidence_of(repository, name) / str(version)
        copy(directory, scratch / "model" / staged, [file.path for file in served(made).files])
        copy(directory, scratch / "evidence", [file for file in EVIDENCE if (directory / file).is_file()])
        for file, content in provenance.documents(made, scratch / "evidence", name, version).items():
            (scratch / "evidence" / file).write_bytes(content)
        if not known:
            text = config.render(replace(wanted, versions=(version,)))
            (scratch / "model" / config.FILE).write_text(text)
            (scratch / "model" / values.FILE).write_text(values.write(said, made, name))
        artifact.settle_on_disk(scratch)
        arrives = (
            Move(scratch / "model" / staged, known.model / staged)
            if known
            else Move(scratch / "model", staging_area(repository) / name)
        )
        event = history.following(
            evidence_of(repository, name) / history.FILE,
            "publish",
            version,
            known.live if known else (),
            None,
            {"artifact": artifact.identity(directory), "kind": made.kind},
        )
        journal.commit(repository, name, [arrives, Move(scratch / "evidence", evidence)], event)
        return _published(repository, state(repository, name), version, already=False)


def _values(max_batch_size: int | None, triton_release: str) -> values.Values:
    text = "" if max_batch_size is None else f"max_batch_size: {max_batch_size}\n"
    return values.read(values.with_release(text, triton_release), "the command")


def verify(files: Path, evidence: Path, made: Artifact) -> None:
    """Compare a published version, its directory and its evidence, with its manifest."""
    artifact.verify(evidence, kept(made))
    artifact.verify(files, served(made), evidence / artifact.LEDGER)


def served(made: Artifact) -> Artifact:
    """The manifest of what lies in a version's directory."""
    return replace(made, files=tuple(file for file in made.files if file.path not in EVIDENCE))


def kept(made: Artifact) -> Artifact:
    """The manifest of what lies among its evidence."""
    return replace(made, files=tuple(file for file in made.files if file.path in EVIDENCE))


def _state(repository: Path, name: str) -> State | None:
    """None for a new model."""
    if is_live(repository, name) or (staging_area(repository) / name).exists():
        return state(repository, name)
    return None


def _published_as(identity: str, repository: Path, known: State) -> int | None:
    for version in sorted((*known.staged, *known.unlisted, *known.live), reverse=True):
        evidence = evidence_of(repository, known.name) / str(version)
        if (evidence / artifact.MANIFEST).is_file() and artifact.identity(evidence) == identity:
            return version
    return None


def _carry_verdict(directory: Path, evidence: Path) -> None:
    """The artifact may have been validated after it was published; these are the same bytes."""
    if (directory / artifact.REPORT).is_file() and not (evidence / artifact.REPORT).is_file():
        artifact.write_atomically(evidence / artifact.REPORT, (directory / artifact.REPORT).read_bytes())


def _published(repository: Path, known: State, version: int, *, already: bool) -> Published:
    return Published(
        model=known.name,
        version=version,
        path=known.model / known.directory(version),
        evidence=evidence_of(repository, known.name) / str(version),
        already=already,
    )


def _check_config(known: State, wanted: config.Config, max_batch_size: int | None) -> None:
    path = known.model / config.FILE
    if reason := config.mismatch(known.config, wanted):
        raise PolicyError(f"{path} cannot serve this artifact: {reason}; publish it under another name")
    if max_batch_size not in (None, known.config.max_batch_size):
        raise UsageError(
            f"{known.name} has max_batch_size {known.config.max_batch_size}, for all its versions; "
            f"edit {path} to make it {max_batch_size}"
        )


def _check_release(known: State, made: Artifact, runtime: Runtime | None, subject: str) -> None:
    declared = stamps.declared(known.model)
    if declared is None:
        return
    if runtime and runtime.release != declared.release:
        raise UsageError(
            f"{known.name} is declared for Triton {declared.release}, for all its versions; run nemoport repo config "
            f"with --triton-release {runtime.release} first"
        )
    stamps.check(made, runtime or declared, subject)


def check_paths(directory: Path, made: Artifact) -> None:
    for file in made.files:
        path = PurePosixPath(file.path)
        if path.is_absolute() or ".." in path.parts:
            raise DamagedInput(
                f"{directory / artifact.MANIFEST} lists {file.path}, outside the artifact; convert again"
            )
