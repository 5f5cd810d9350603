"""A pipeline planned: every conversion checked, and found in the cache or not; nothing has been written."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from blake3 import blake3

from nemoport import artifact
from nemoport.compatibility import Runtime, triton
from nemoport.errors import MachineError, UsageError
from nemoport.exporters import convert, loadable, stream
from nemoport.exporters.formats.structured import mapping
from nemoport.exporters.job import Job, fingerprint
from nemoport.pipeline.recipe import Pipeline, Wanted
from nemoport.repository.ensemble import Member, signed, wired
from nemoport.repository.kinds import KINDS

_PROBE = 32 * 2**20


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One model: its conversion, and what comes after it."""

    wanted: Wanted
    job: Job
    converted: bool
    """Its artifact lies in the cache already."""

    @property
    def published(self) -> bool:
        return self.wanted.publish if self.wanted.publish is not None else self.wanted.to in KINDS

    @property
    def staged(self) -> bool:
        """It comes as pipeline stages, to be published as a model for each."""
        return bool(self.job.output.stages)

    @property
    def steps(self) -> tuple[str, ...]:
        wanted = self.wanted
        two = (*(["publish"] if self.published else []), *(["validate"] if wanted.validate else []))
        return (
            "convert",
            *(two[::-1] if self.staged else two),
            *(["promote"] if self.published and wanted.promote else []),
            *([f"label {wanted.label}"] if self.published and wanted.label else []),
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "model": self.wanted.name,
            "source": str(self.wanted.source),
            "to": self.wanted.to,
            "steps": list(self.steps),
            "converted": self.converted,
            "bytes": self.job.bytes,
            "artifact": str(self.job.destination),
        }


@dataclass(frozen=True, kw_only=True)
class Need:
    """What the conversions still to be made take, one at a time."""

    bytes: int
    free: int
    seconds: float
    """At least: as long as writing and hashing the bytes took when it was tried. Calibration and validation run the
    models, and take what they take."""


def plan(pipeline: Pipeline, max_memory: int = stream.DEFAULT_MEMORY) -> tuple[Planned, ...]:
    """Everything that `run` will do, checked: sources, families, divisions, methods, and how ensembles are wired."""
    planned = tuple(_planned(pipeline, wanted, max_memory) for wanted in pipeline.models)
    for each in planned:
        _check_stages(pipeline, each)
    signatures = {each.wanted.name: each.job.output.signature for each in planned}
    for joined in pipeline.ensembles:
        wired(joined.name, [Member(step, signed(step, signatures[step])) for step in joined.steps])
    return planned


def need(pipeline: Pipeline, planned: tuple[Planned, ...]) -> Need:
    left = [each.job for each in planned if not each.converted]
    size, place = sum(job.bytes for job in left), _standing(pipeline.cache)
    return Need(
        bytes=size,
        free=shutil.disk_usage(place).free,
        seconds=size / _rate(place) if size else 0.0,
    )


def _planned(pipeline: Pipeline, wanted: Wanted, max_memory: int) -> Planned:
    served = wanted.publish if wanted.publish is not None else wanted.to in KINDS
    meant = runtime(wanted.triton_release) if served else None
    if meant:
        loadable.foresee(wanted.to, wanted.plan, _calibrated(wanted), meant)
    job = convert.plan(
        wanted.source,
        wanted.to,
        pipeline.cache / ".unplanned",
        config=_config(wanted),
        plan=wanted.plan,
        adapter=wanted.adapter,
        calibration=_calibration(wanted),
        max_memory=max_memory,
    )
    if meant:
        loadable.check(job, meant)
    key = fingerprint(job)
    job = replace(job, destination=pipeline.cache / f"{wanted.name}-{key[:16]}")
    return Planned(wanted=wanted, job=job, converted=(job.destination / artifact.MANIFEST).is_file())


def runtime(release: str | None) -> Runtime | None:
    """All containers of the release that a file names."""
    return triton(release) if release else None


def _check_stages(pipeline: Pipeline, planned: Planned) -> None:
    name = planned.wanted.name
    if planned.staged and planned.wanted.label:
        raise UsageError(f"{name} is an ensemble of stages, which a label would not pin; leave label out, or use pp 1")
    for joined in pipeline.ensembles:
        if planned.staged and name in joined.steps:
            raise UsageError(f"{name} is itself an ensemble of stages; use pp 1 to make it a step of {joined.name}")


def _calibrated(wanted: Wanted) -> bool:
    return bool(wanted.calibrated.tokens or wanted.calibrated.statistics)


def _calibration(wanted: Wanted) -> Any:
    from nemoport import calibration

    given = wanted.calibrated
    if given.statistics:
        return calibration.from_statistics(given.statistics)
    if given.tokens is None:
        return None
    sizes = {"samples": given.samples, "length": given.length, "batch": given.batch}
    limits = calibration.Limits(**{name: size for name, size in sizes.items() if size is not None})
    return calibration.from_tokens(given.tokens, wanted.source, _config(wanted), limits)


def _config(wanted: Wanted) -> Mapping[str, Any] | None:
    return mapping(wanted.config) if wanted.config else None


def _standing(path: Path) -> Path:
    """The nearest directory that is there."""
    return next(place for place in (path, *path.parents) if place.is_dir())


def _rate(place: Path) -> float:
    """Bytes in a second that are hashed, written and synced here."""
    block, began = bytes(_PROBE), time.perf_counter()
    try:
        with TemporaryFile(dir=place) as file:
            blake3(block).digest()
            file.write(block)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise MachineError(f"{place} cannot be written: {error.strerror}; name another as cache") from error
    return _PROBE / (time.perf_counter() - began)
