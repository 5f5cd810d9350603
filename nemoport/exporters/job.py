"""One conversion, fully planned, and what makes it the same as another."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from nemoport import __version__
from nemoport.exporters.checkpoint import Model, Output, Slot
from nemoport.exporters.tensor import nbytes
from nemoport.spec import Plan, to_json


@dataclass(frozen=True, kw_only=True)
class Job:
    kind: str
    model: Model
    plan: Plan
    output: Output
    destination: Path
    config: Mapping[str, Any] | None = None
    """What the user gave with --config; told to `origin.json`."""
    adapter: Path | None = None
    """Where the adapter lies that was merged or is carried; told to `origin.json` too."""
    calibration: Mapping[str, Any] | None = None
    """What it was calibrated on and how much of it; told to `origin.json`, so that the rest can judge."""
    workers: int = 1
    prepare: Callable[[], object] = lambda: None
    """What needs the whole model and comes before: calibration."""

    @property
    def bytes(self) -> int:
        return sum(nbytes(slot.tensor) for file in self.output.files for slot in file.slots)


def transform(model: Model, slot: Slot) -> str:
    """What was done to its parts before the target had them, and then by the target."""
    before = dict.fromkeys(model.transforms[part] for part in slot.parts if part in model.transforms)
    return ", ".join([*before, *([slot.transform] if slot.transform else [])])


def fingerprint(job: Job) -> str:
    """What two runs of the same job share: version, plan, the layout of every output, the files of the source."""
    sources = [job.model.checkpoint.path, *([job.adapter] if job.adapter else [])]
    facts = {
        "version": __version__,
        "kind": job.kind,
        "plan": to_json(job.plan),
        "files": [
            [
                file.path,
                hashed(file.header),
                [[slot.name, slot.parts, transform(job.model, slot)] for slot in file.slots],
            ]
            for file in job.output.files
        ],
        "sidecars": {name: hashed(content) for name, content in job.output.sidecars.items()},
        "source": [str(source.resolve()) for source in sources],
        "stored": [stamp for source in sources for stamp in _stamps(source)],
    }
    return hashed(json.dumps(facts, sort_keys=True).encode())


def hashed(content: bytes) -> str:
    return blake3(content).hexdigest()


def _stamps(source: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of every file of a checkpoint."""
    stored = sorted(source.rglob("*")) if source.is_dir() else [source]
    files = [(str(path.relative_to(source)), path.stat()) for path in stored if path.is_file()]
    return [(name, status.st_size, status.st_mtime_ns) for name, status in files]
