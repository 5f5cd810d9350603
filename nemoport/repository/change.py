"""From what a model is to what it shall be: the steps in between, in an order that a server never trips over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3

from nemoport import artifact
from nemoport.repository import config, history, journal, values
from nemoport.repository.journal import Move, Remove, Step, Write
from nemoport.repository.storage import TRASH
from nemoport.repository.versions import State, evidence_of, is_live, staging_area, state

PROMOTION = "promotion.json"
"""In a version's evidence: who let it go live, and on which verdict."""


@dataclass(frozen=True, kw_only=True)
class Done:
    model: str
    what: str
    version: int | None
    path: Path
    live: tuple[int, ...]
    """Every version that is served now."""
    already: bool = False
    """It was so before; nothing was done."""
    details: Mapping[str, Any] = field(default_factory=dict)


def unchanged(known: State, what: str, version: int | None) -> Done:
    return Done(model=known.name, what=what, version=version, path=_path(known, version), live=known.live, already=True)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a model shall be."""

    live: Sequence[int]
    labels: Mapping[str, int]
    leaving: Sequence[int] = ()
    """Versions whose files are removed."""
    text: str | None = None
    """Another config; None keeps the one that is there."""
    values: str | None = None
    """Other values to generate it from; None as well."""


def make(
    repository: Path,
    known: State,
    wanted: Wanted,
    what: str,
    version: int | None,
    details: Mapping[str, Any],
    *,
    admitted: Mapping[str, Any] | None = None,
) -> Done:
    """Commit the change. `admitted` is what the gate said of `version`, for its evidence. The caller holds the lock."""
    steps, text = _steps(repository, known, wanted)
    told = evidence_of(repository, known.name) / history.FILE
    digest = blake3(text.encode()).hexdigest() if wanted.live else None
    event = history.following(told, what, version, tuple(sorted(wanted.live)), digest, {**details, **(admitted or {})})
    if admitted:
        record = {"version": version, "what": what, "when": event.when, "by": event.by, **admitted}
        place = evidence_of(repository, known.name) / str(version) / PROMOTION
        steps.insert(0, Write(place, artifact.json_bytes(record).decode()))
    journal.commit(repository, known.name, steps, event)
    after = state(repository, known.name)
    path = _path(after, version)
    return Done(model=known.name, what=what, version=version, path=path, live=after.live, details=details)


def _steps(repository: Path, known: State, wanted: Wanted) -> tuple[list[Step], str]:
    """What arrives, then what configs say, then what leaves; and the new text of config.pbtxt."""
    model, steps = known.model, list[Step]()
    for number in sorted({*wanted.live, *wanted.labels.values()} & set(known.staged)):
        steps.append(Move(model / known.directory(number), model / str(number)))
    path = model / config.FILE
    text = wanted.text if wanted.text is not None else path.read_text()
    if wanted.live:
        text = config.with_versions(text, wanted.live, str(path))
    for label, number in sorted(wanted.labels.items()):
        place = model / config.LABELS / f"{label}.pbtxt"
        steps.append(Write(place, config.labelled(text, label, number, wanted.live, str(path))))
    steps += [Remove(model / config.LABELS / f"{label}.pbtxt") for label in known.labels.keys() - wanted.labels.keys()]
    if wanted.values is not None:
        steps.append(Write(model / values.FILE, wanted.values))
    if text != path.read_text():
        steps.append(Write(path, text))
    away = staging_area(repository)
    for number in sorted(wanted.leaving):
        trash = away / f"{TRASH}-{known.name}-{number}"
        steps += [Move(model / known.directory(number), trash), Remove(trash)]
    if wanted.live and not is_live(repository, known.name):
        steps.append(Move(model, repository.resolve() / known.name))
    if not wanted.live and is_live(repository, known.name):
        steps.append(Move(model, away / known.name))
    return steps, text


def _path(known: State, version: int | None) -> Path:
    return known.model if version is None else known.model / known.directory(version)
