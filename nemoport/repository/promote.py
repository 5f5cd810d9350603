"""Promotion: a version that was proven goes live.

The new version is added to those that are live, and as the highest it answers every request that names none; the
versions before it stay for clients that pin them, and for the way back. The config is replaced last and at once: that
is the moment of promotion. A model that was never live is put together beside the repository and moved into it whole.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemoport import artifact
from nemoport.errors import DamagedInput, PolicyError, UsageError
from nemoport.repository import config
from nemoport.repository.publish import verify
from nemoport.repository.storage import changing, move
from nemoport.repository.versions import State, evidence_of, is_live, number_of, state


@dataclass(frozen=True, kw_only=True)
class Promoted:
    model: str
    version: int
    path: Path
    live: tuple[int, ...]
    """Every version that is served now."""
    already: bool
    """The version was live before; nothing was done."""


def promote(repository: Path, name: str, version: str | None = None, *, force: bool = False) -> Promoted:
    """Make a staged version live: `7`, `staging-7`, or the newest. It needs a green verdict on exactly its bytes;
    `force` takes a red one, and none takes a version that was never validated."""
    state(repository, name)  # a wrong name is refused before anything is made
    with changing(repository, name):
        known = state(repository, name)
        number = _number(repository, known, version)
        if number in known.live:
            return Promoted(model=name, version=number, path=known.model / str(number), live=known.live, already=True)
        _check_verdict(repository, known, number, force)
        path = known.model / config.FILE
        text = config.with_versions(path.read_text(), (*known.live, number), str(path))
        if number in known.staged:
            move(known.model / known.directory(number), known.model / str(number))
        artifact.write_atomically(path, text.encode())
        if not is_live(repository, name):
            move(known.model, repository / name)
        after = state(repository, name)
        return Promoted(model=name, version=number, path=after.model / str(number), live=after.live, already=False)


def _number(repository: Path, known: State, version: str | None) -> int:
    number = number_of(version) if version is not None else known.next_up if known.next_up is not None else known.served
    if number is None or number not in (*known.staged, *known.unlisted, *known.live):
        raise UsageError(
            f"{known.name} in {repository} has no version {version or 'to promote'}; "
            f"staged: {', '.join(map(str, known.staged)) or 'none'}, live: {', '.join(map(str, known.live)) or 'none'}"
        )
    return number


def _check_verdict(repository: Path, known: State, number: int, force: bool) -> None:
    evidence, directory = evidence_of(repository, known.name) / str(number), known.directory(number)
    subject = f"version {number} of {known.name} cannot be promoted"
    command = f"nemoport validate {shlex.quote(str(repository))} --model {known.name} --version {directory}"
    made, identity, verdict = artifact.read_manifest(evidence), artifact.identity(evidence), _verdict(evidence)
    if verdict is None:
        raise PolicyError(f"{subject}: it was never validated; run: {command}")
    if verdict.get("artifact") != identity:
        raise PolicyError(f"{subject}: its verdict is on other bytes ({evidence / artifact.REPORT}); run: {command}")
    if verdict.get("passed") is not True and not force:
        raise PolicyError(f"{subject}: its validation did not pass ({evidence / artifact.REPORT}); run: {command}")
    try:
        verify(known.model / directory, evidence, made)
    except DamagedInput as error:
        what = str(error).partition(";")[0]
        raise PolicyError(
            f"{subject}: its files are not the ones that were published: {what}; publish again"
        ) from error
    for each in (*known.live, number):
        if reason := _mismatch(repository, known, each):
            path = known.model / config.FILE
            raise PolicyError(f"{subject}: {path} cannot serve version {each}, which it would list: {reason}")


def _mismatch(repository: Path, known: State, version: int) -> str | None:
    evidence = evidence_of(repository, known.name) / str(version)
    if not (evidence / artifact.MANIFEST).is_file():
        return None  # a live version that nemoport did not publish
    made = artifact.read_manifest(evidence)
    batch = known.config.max_batch_size or config.MAX_BATCH_SIZE
    return config.mismatch(known.config, config.from_artifact(made, known.name, version, batch))


def _verdict(evidence: Path) -> dict[str, Any] | None:
    path = evidence / artifact.REPORT
    if not path.is_file():
        return None
    try:
        verdict = json.loads(path.read_bytes())
    except ValueError as error:
        raise DamagedInput(f"{path} is not JSON ({error}); validate again") from error
    return verdict if isinstance(verdict, dict) else {}
