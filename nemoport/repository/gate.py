"""What stands between a version and the requests of clients: a green verdict on exactly its bytes, a release of Triton
that loads it, and a config that can serve it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from nemoport import artifact
from nemoport.errors import DamagedInput, PolicyError
from nemoport.repository import config, stamps
from nemoport.repository.publish import verify
from nemoport.repository.versions import State, evidence_of


def check(repository: Path, known: State, number: int, *, force: bool) -> dict[str, Any]:
    """Refuse a version that may not go live; else what is recorded of its admission. `force` takes a red verdict, and
    nothing takes a version that was never validated."""
    evidence, directory = evidence_of(repository, known.name) / str(number), known.directory(number)
    subject = f"version {number} of {known.name} cannot be promoted"
    command = f"nemoport validate {shlex.quote(str(repository))} --model {known.name} --version {directory}"
    made, identity, verdict = artifact.read_manifest(evidence), artifact.identity(evidence), verdict_of(evidence)
    if verdict is None:
        raise PolicyError(f"{subject}: it was never validated; run: {command}")
    if verdict.get("artifact") != identity:
        raise PolicyError(f"{subject}: its verdict is on other bytes ({evidence / artifact.REPORT}); run: {command}")
    green = verdict.get("passed") is True
    if not green and not force:
        raise PolicyError(f"{subject}: its validation did not pass ({evidence / artifact.REPORT}); run: {command}")
    try:
        verify(known.model / directory, evidence, made)
    except DamagedInput as error:
        what = str(error).partition(";")[0]
        raise PolicyError(
            f"{subject}: its files are not the ones that were published: {what}; publish again"
        ) from error
    if declared := stamps.declared(known.model):
        stamps.check(made, declared, f"{subject} to what is declared for Triton {declared.release}")
    for each in sorted({*known.live, number}):
        if reason := _mismatch(repository, known, each):
            path = known.model / config.FILE
            raise PolicyError(f"{subject}: {path} cannot serve version {each}, which it would list: {reason}")
    return {"artifact": identity, "verdict": "green" if green else "red", "forced": not green}


def verdict_of(evidence: Path) -> dict[str, Any] | None:
    """None for a version that was never validated."""
    path = evidence / artifact.REPORT
    if not path.is_file():
        return None
    try:
        verdict = json.loads(path.read_bytes())
    except ValueError as error:
        raise DamagedInput(f"{path} is not JSON ({error}); validate again") from error
    return verdict if isinstance(verdict, dict) else {}


def _mismatch(repository: Path, known: State, version: int) -> str | None:
    evidence = evidence_of(repository, known.name) / str(version)
    if not (evidence / artifact.MANIFEST).is_file():
        return None  # a live version that nemoport did not publish
    made = artifact.read_manifest(evidence)
    batch = known.config.max_batch_size or config.MAX_BATCH_SIZE
    return config.mismatch(known.config, config.from_artifact(made, known.name, version, batch))
