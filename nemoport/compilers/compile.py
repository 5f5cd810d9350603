"""The verb `compile`: plan everything, refuse what cannot be, then build here or leave the job to another machine.

A job lies beside the destination, `engines.job` for `engines`, until its product has become the artifact with one
rename. So the same command continues where it stopped: it finds the artifact, or the product, or the job, or nothing.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from nemoport import artifact, plugins
from nemoport.artifact import MANIFEST, ORIGIN, Artifact
from nemoport.compatibility import Runtime
from nemoport.compilers import job, meant
from nemoport.compilers.build import PRODUCT, Build, Option
from nemoport.errors import DamagedInput, UnsupportedInput, UsageError

BUILDERS = "nemoport.compilers.builders"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One compilation, fully checked."""

    source: Path
    made: Artifact
    """The source's manifest."""
    destination: Path
    build: Build
    request: Mapping[str, Any]
    """Which build of what this is: two plans with the same one leave the same artifact."""
    runtime: Runtime | None = None
    """What shall load it."""

    @property
    def job(self) -> Path:
        """Where the job lies until the artifact is there."""
        return self.destination.with_name(f"{self.destination.name}.job")


@cache
def options() -> Mapping[Option, tuple[str, ...]]:
    """What builders may be told, and who takes it. One name has one meaning for all."""
    takers: dict[Option, tuple[str, ...]] = {}
    for to, builder in plugins.load_all(BUILDERS).items():
        for option in builder.OPTIONS:
            takers[option] = (*takers.get(option, ()), to)
    assert len({option.name for option in takers}) == len(takers), "two builders have one option with two meanings"
    return takers


def plan(source: Path, to: str, destination: Path, given: Mapping[str, Any], runtime: Runtime | None = None) -> Plan:
    """Everything that will be done, checked; nothing has been written. `given` has the options that were. What is built
    for a runtime is built by the releases that are in it."""
    builder = plugins.load(BUILDERS, to)
    known = {option.name for option in builder.OPTIONS}
    if unknown := sorted(given.keys() - known):
        has = ", ".join(_flag(name) for name in sorted(known))
        raise UsageError(f"{_flag(unknown[0])} is no option of --to {to}, which has {has}; leave it out")
    made = artifact.read_manifest(source)
    if made.kind != builder.TAKES:
        raise UnsupportedInput(
            f"{source} is an artifact of kind {made.kind}, and --to {to} compiles {builder.TAKES}; "
            f"make one with `nemoport convert --to {builder.TAKES}`"
        )
    artifact.check_outside(destination, source, "artifact")
    place = meant.place(made, source, to, runtime) if runtime else None
    build: Build = builder.plan(source, made, given)
    if place and runtime:
        build = meant.narrowed(build, place, runtime, chosen="container" in given)
    # As JSON has it, to be compared with what is read back.
    request = json.loads(json.dumps({"artifact": artifact.identity(source), "to": to, "asked": build.asked}))
    planned = Plan(source=source, made=made, destination=destination, build=build, request=request, runtime=runtime)
    _check_place(planned)
    return planned


def run(planned: Plan) -> Artifact:
    """Finish what was begun, or build. Where this machine cannot, the job is written, and the error says so."""
    with _alone(planned) as lock:
        if not planned.destination.exists():
            if not (planned.job / PRODUCT).is_dir():
                _write(planned)
                if planned.build.lacking:
                    raise job.lost(planned.build, planned.job)
                job.run(planned.job, lock)
            _finish(planned)
        job.remove(planned.job)
    return artifact.read_manifest(planned.destination)


def write_job(planned: Plan) -> None:
    """Only the job, for another machine."""
    if not planned.destination.exists():
        with _alone(planned):
            if not (planned.job / PRODUCT).is_dir():
                _write(planned)


def _write(planned: Plan) -> None:
    artifact.verify(planned.source, planned.made)
    job.write(planned.job, planned.build, planned.source, planned.made, planned.request)


def _finish(planned: Plan) -> None:
    """Check the product, write its manifest, and make it the artifact."""
    build, product = planned.build, planned.job / PRODUCT
    try:
        built_with = job.facts(planned.job)
        build.check(product, built_with)
    except DamagedInput as error:  # the script leaves alone what looks complete
        raise DamagedInput(f"{error}, once {product} is removed") from error
    for name in build.carried:
        (product / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(planned.source / name, product / name)
    for name, kept in build.kept.items():
        if (planned.job / name).is_file():
            kept.parent.mkdir(parents=True, exist_ok=True)
            artifact.write_atomically(kept, (planned.job / name).read_bytes())
    if (planned.source / ORIGIN).is_file():
        shutil.copyfile(planned.source / ORIGIN, product / ORIGIN)
    made = planned.made
    finished = Artifact(
        kind=build.kind,
        spec=made.spec,
        plan=made.plan,
        dtype=made.dtype,
        files=tuple(_files(product)),
        loads=build.loads(built_with),
        source={**made.source, "compiled": dict(planned.request)},
        signature=build.signature,
        stages=build.stages,
        built_with=built_with,
    )
    if planned.runtime:
        meant.check(finished, product, planned.runtime)
    artifact.write_manifest(product, finished)
    os.rename(product, planned.destination)
    artifact.sync_directory(planned.destination.parent)


def _files(product: Path) -> Iterator[artifact.File]:
    """What a product is made of, on the disk when this returns."""
    for begun in product.glob(f".{MANIFEST}.*"):  # by a process that was killed
        begun.unlink()
    for path in sorted(path for path in product.rglob("*") if path.is_file()):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        if path.relative_to(product).as_posix() not in (MANIFEST, ORIGIN):
            yield artifact.describe(path, product)


def _check_place(planned: Plan) -> None:
    """Refuse a place that is taken by anything but this very compilation."""
    place, begun = planned.destination, planned.job
    if os.path.lexists(place):
        found = artifact.read_manifest(place) if (place / MANIFEST).is_file() else None
        if found is None or found.source.get("compiled") != planned.request:
            raise UsageError(f"{place} exists and is not what this would build; remove it, or choose another with -o")
    if (begun_for := job.request(begun)) not in (None, planned.request):
        what = "the job of another build" if begun_for else "no job of nemoport's"
        raise UsageError(f"{begun} is {what}; remove it, or choose another directory with -o")
    for kept in planned.build.kept.values():
        if kept.is_dir():
            raise UsageError(f"{kept} is a directory, and a file is kept there; name the file")


@contextmanager
def _alone(planned: Plan) -> Iterator[int]:
    """One process at a time works at a destination: who holds the job's directory, by this handle."""
    planned.job.mkdir(parents=True, exist_ok=True)
    handle = os.open(planned.job, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _check_place(planned)  # another process may have come first
        yield handle
    except BlockingIOError:
        raise UsageError(
            f"another nemoport is building {planned.destination}; wait for it, or choose another directory"
        ) from None
    finally:
        os.close(handle)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def as_json(planned: Plan, finished: Artifact | None) -> dict[str, Any]:
    """The plan, and what came of it, for `--json`."""
    build = planned.build
    return {
        "artifact": planned.request["artifact"],
        "to": planned.request["to"],
        "asked": planned.request["asked"],
        "state": "built" if finished else "job",
        "path": str(planned.destination if finished else planned.job),
        "commands": [list(command) for command in build.commands],
        "container": build.container,
        "lacking": build.lacking,
        "built_with": dict(finished.built_with) if finished else None,
        "loads": finished.loads if finished else None,
    }
