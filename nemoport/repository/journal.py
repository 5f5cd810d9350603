"""A change is written down before it is made, and made to its end by whoever comes next.

`commit` writes all steps of a change into REPO.evidence/.journal, then does them; that write is the moment of the
change. At any moment the steps leave a tree that a server loads: what arrives is moved in before a config lists it, and
what leaves is moved out after no config lists it. A process that is killed in between has changed the model: the next
writer finishes its steps, from the last rename that was done, and only then does its own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemoport import artifact
from nemoport.artifact import sync_directory
from nemoport.errors import DamagedInput
from nemoport.repository import history
from nemoport.repository.versions import evidence_area, evidence_of

FILE = ".journal"


@dataclass(frozen=True)
class Move:
    """A rename; the target does not exist, or is an empty directory."""

    path: Path
    target: Path


@dataclass(frozen=True)
class Write:
    """Of a small file, whole and at once."""

    path: Path
    text: str


@dataclass(frozen=True)
class Remove:
    path: Path


Step = Move | Write | Remove
_STEPS = {"move": Move, "write": Write, "remove": Remove}


def commit(repository: Path, name: str, steps: Sequence[Step], event: history.Event | None) -> None:
    """Do the steps, then enter the event into the model's history; None where the steps bring the history along. The
    caller holds the lock."""
    root = repository.resolve().parent
    line = history.line(event).decode() if event else ""
    data = {"model": name, "event": line, "steps": [_as_json(step, root) for step in steps]}
    artifact.write_atomically(evidence_area(repository) / FILE, artifact.json_bytes(data))
    finish(repository)


def begun(repository: Path) -> bool:
    return (evidence_area(repository) / FILE).is_file()


def finish(repository: Path) -> None:
    """Do what is written down, if anything is. The caller holds the lock."""
    path, root = evidence_area(repository) / FILE, repository.resolve().parent
    if not path.is_file():
        return
    try:
        data = json.loads(path.read_bytes())
        steps = [_from_json(row, root) for row in data["steps"]]
        told = evidence_of(repository, data["model"]) / history.FILE
        line = data["event"].encode()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedInput(f"{path} is not a journal that nemoport wrote ({error!r}); look at it, remove it") from error
    done = [number for number, step in enumerate(steps, 1) if isinstance(step, Move) and not step.path.exists()]
    for step in steps[max(done, default=0) :]:  # a model that has moved took with it what the steps before had done
        _do(step)
    if line:
        told.parent.mkdir(exist_ok=True)
        history.append(told, line)
    path.unlink()
    sync_directory(path.parent)


def _do(step: Step) -> None:
    match step:
        case Move(path, target):
            target.parent.mkdir(exist_ok=True)
            move(path, target)
        case Write(path, text):
            path.parent.mkdir(exist_ok=True)
            artifact.write_atomically(path, text.encode())
        case Remove(path):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def move(source: Path, target: Path) -> None:
    """A rename that survives a power cut."""
    source.rename(target)
    sync_directory(target.parent)
    if source.parent != target.parent:
        sync_directory(source.parent)


def _as_json(step: Step, root: Path) -> dict[str, Any]:
    """Paths are relative to the directory that the repository lies in, which may be moved as a whole."""
    kind = type(step).__name__.lower()
    return {"do": kind} | {
        key: value.relative_to(root).as_posix() if isinstance(value, Path) else value
        for key, value in asdict(step).items()
    }


def _from_json(row: dict[str, Any], root: Path) -> Step:
    kind = _STEPS[row.pop("do")]
    step: Step = kind(**{key: root / value if key in ("path", "target") else value for key, value in row.items()})
    return step
