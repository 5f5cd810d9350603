"""Whether a repository is what its evidence says: every file of every version, every config, every history, and with
keys every signature. For a repository on disk, and for one elsewhere, whose bytes are read through and not kept."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from blake3 import blake3

from nemoport import artifact
from nemoport.errors import DamagedInput, NemoportError, PolicyError
from nemoport.repository import config, history, provenance, publish, signing
from nemoport.repository.remote import Remote
from nemoport.repository.versions import State, evidence_of, is_live, models, state

BLOCK = 4 * 2**20
CACHE = "__pycache__"
"""A tritonserver that runs a python model leaves one beside it, so `verify` does not count it; `admit` removes it."""


@dataclass(frozen=True, kw_only=True)
class Checked:
    model: str
    version: int | None
    """None for the model itself: its configs and its history."""
    problem: str | None
    signed_by: str | None = None


def verify(repository: Path, keys: Sequence[Any] = (), *, names: Sequence[str] | None = None) -> list[Checked]:
    """Every version on disk, also staged ones; a directory at the root that is no model of ours is a problem too."""
    known = models(repository) if names is None else names
    strangers = sorted(
        path.name for path in repository.iterdir() if path.is_dir() and path.name not in models(repository)
    )
    found = [row for name in known for row in _model(repository, name, list(keys))]
    if names is None:
        found += [
            _row(name, None, f"{repository / name} is no model with a config; move it away") for name in strangers
        ]
    return found


def admit(model: Path, keys: Sequence[Any] = ()) -> None:
    """Refuse a model's directory, as a server is about to load it, if anything in it is not what was published. Python
    would run a compiled module in place of the source that was verified, so those are removed first."""
    for cache in model.rglob(CACHE):
        shutil.rmtree(cache)
    if wrong := [row for row in verify(model.parent, keys, names=[model.name]) if row.problem]:
        raise PolicyError(f"{model.name} is not what was published: {wrong[0].problem}")


def verify_remote(remote: Remote, keys: Sequence[Any] = (), *, names: Sequence[str] | None = None) -> list[Checked]:
    """The versions that servers of that repository may be told to load."""
    return [row for name in (names or remote.models()) for row in _model_there(remote, name, list(keys))]


def _model(repository: Path, name: str, keys: list[Any]) -> Iterator[Checked]:
    try:
        known = state(repository, name)
        _check_configs(repository, known)
    except NemoportError as error:
        yield _row(name, None, str(error))
        return
    for version in known.every:
        files, evidence = known.model / known.directory(version), evidence_of(repository, name) / str(version)
        try:
            made = artifact.read_manifest(evidence)
            publish.verify(files, evidence, made)
            present = {path.relative_to(files) for path in files.rglob("*") if not path.is_dir()}
            _check_strangers({path.as_posix() for path in present if CACHE not in path.parts}, made, files)
            yield _row(name, version, None, _signed(made, evidence, name, version, keys))
        except NemoportError as error:
            yield _row(name, version, str(error))
    if is_live(repository, name):
        for number in sorted(set(known.config.versions) - set(known.live)):
            yield _row(name, number, f"{known.model / config.FILE} lists version {number}, which is not there")
        yield _row(name, None, None)


def _check_configs(repository: Path, known: State) -> None:
    """The config as the newest event left it, and those of the labels as they follow from it."""
    told = evidence_of(repository, known.name) / history.FILE
    history.check(told)
    path = known.model / config.FILE
    left = next((event.config for event in reversed(history.read(told)) if event.config), None)
    if is_live(repository, known.name) and blake3(path.read_bytes()).hexdigest() != left:
        raise DamagedInput(
            f"{path} was changed by hand since version {known.served} was made live; put it on record with: "
            f"nemoport repo config {repository} {known.name} --keep"
        )
    for label, version in known.labels.items():
        place = known.model / config.LABELS / f"{label}.pbtxt"
        if place.read_text() != config.labelled(path.read_text(), label, version, known.live, str(path)):
            raise DamagedInput(f"{place} does not follow from {path}; run the same command")


def _check_strangers(present: set[str], made: artifact.Artifact, place: Path | str) -> None:
    if strange := sorted(present - {file.path for file in publish.served(made).files}):
        raise DamagedInput(
            f"{place} holds {strange[0]}, which was not published ({len(strange)} such files); remove it"
        )


def _signed(made: artifact.Artifact, evidence: Path, name: str, version: int, keys: list[Any]) -> str | None:
    """The documents must follow from the manifest; with keys, one of them must have signed the statement."""
    for document, content in provenance.documents(made, evidence, name, version).items():
        if (evidence / document).is_file() and (evidence / document).read_bytes() != content:
            raise DamagedInput(f"{evidence / document} does not follow from the manifest beside it; publish again")
    if not keys:
        return None
    path = evidence / signing.FILE
    if not path.is_file():
        raise PolicyError(f"version {version} of {name} is not signed; run: nemoport repo sign")
    statement = artifact.json_bytes(provenance.statement(made, evidence, name, version))
    return signing.check(path.read_bytes(), statement, keys, path)


def _model_there(remote: Remote, name: str, keys: list[Any]) -> Iterator[Checked]:
    place = f"{remote.root}/{name}"
    texts = [config.FILE, *(f"{config.LABELS}/{path}" for path in remote.sizes(f"{place}/{config.LABELS}"))]
    try:
        listed = sorted({v for path in texts for v in _versions(remote, f"{place}/{path}")})
    except NemoportError as error:
        yield _row(name, None, str(error))
        return
    for version in listed:
        with TemporaryDirectory(prefix="nemoport-") as scratch:
            evidence = Path(scratch)
            try:
                for document in remote.sizes(f"{remote.evidence}/{name}/{version}"):
                    remote.download(f"{remote.evidence}/{name}/{version}/{document}", evidence / document)
                made = artifact.read_manifest(evidence)
                _check_there(remote, f"{place}/{version}", made, evidence)
                yield _row(name, version, None, _signed(made, evidence, name, version, keys))
            except NemoportError as error:
                yield _row(name, version, str(error))


def _versions(remote: Remote, path: str) -> tuple[int, ...]:
    if (content := remote.read(path)) is None:
        raise DamagedInput(f"{remote} has no {path}; push the model again")
    return config.parse(content.decode(), path).versions


def _check_there(remote: Remote, place: str, made: artifact.Artifact, evidence: Path) -> None:
    artifact.verify(evidence, publish.kept(made))
    sizes, whole = remote.sizes(place), publish.served(made)
    _check_strangers(set(sizes), made, place)
    pieces = artifact.pieces(evidence / artifact.LEDGER) if any(file.blake3 is None for file in whole.files) else {}
    for file in whole.files:
        if sizes.get(file.path) != file.size:
            raise DamagedInput(f"{place}/{file.path} has {sizes.get(file.path)} bytes, {file.size} in the manifest")
        parts = [artifact.Piece(file.path, 0, file.size, file.blake3)] if file.blake3 else pieces.get(file.path, [])
        if not parts:
            raise DamagedInput(f"{place}/{file.path} is not in the ledger")
        with remote.files.open(f"{place}/{file.path}", "rb") as stream:
            for part in sorted(parts, key=lambda part: part.offset):
                if _digest(stream, part.offset, part.size) != part.blake3:
                    raise DamagedInput(f"{part.name} in {place}/{file.path} differs from its digest; push it again")


def _digest(stream: Any, offset: int, size: int) -> str:
    hasher = blake3()
    stream.seek(offset)
    while size and (content := stream.read(min(size, BLOCK))):
        hasher.update(content)
        size -= len(content)
    return str(hasher.hexdigest())


def _row(model: str, version: int | None, problem: str | None, signed_by: str | None = None) -> Checked:
    return Checked(model=model, version=version, problem=problem, signed_by=signed_by)
