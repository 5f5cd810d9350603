"""A planned pipeline done: each step once, whoever is killed, and one model's failure no other's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nemoport import artifact, check, validation
from nemoport.errors import CheckFailed, NemoportError
from nemoport.exporters import stream
from nemoport.pipeline.plan import Planned
from nemoport.pipeline.recipe import Pipeline
from nemoport.repository import gate, labels, remote, transfer, versions
from nemoport.repository.promote import promote
from nemoport.repository.publish import publish

Status = Literal["did", "found done", "failed"]


@dataclass(frozen=True, kw_only=True)
class Step:
    model: str
    """Empty for a step of the whole repository."""
    verb: str
    status: Status
    said: str
    seconds: float
    exit_code: int = 0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    pipeline: Pipeline
    steps: tuple[Step, ...]

    @property
    def exit_code(self) -> int:
        """Of the first step that failed."""
        return next((step.exit_code for step in self.steps if step.status == "failed"), 0)

    def as_json(self) -> dict[str, Any]:
        return {
            "passed": self.exit_code == 0,
            "repository": str(self.pipeline.repository),
            "steps": [vars(step) | {"seconds": round(step.seconds, 3)} for step in self.steps],
        }


Tell = Callable[[Step], None]
Work = Callable[[], tuple[Status, str]]


def run(
    pipeline: Pipeline,
    planned: tuple[Planned, ...],
    *,
    jobs: int = 1,
    tell: Tell = lambda step: None,
    progress: stream.Progress = lambda count: None,
) -> Outcome:
    """`tell` hears of every step when it ends, `progress` of bytes converted; both from any thread."""
    pipeline.cache.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(jobs, thread_name_prefix="build") as threads:
        done = threads.map(lambda each: tuple(_model(pipeline, each, tell, progress)), planned)
        steps = [step for each in done for step in each]
    steps += _whole(pipeline, tell, bool(steps) and all(step.status != "failed" for step in steps))
    return Outcome(pipeline=pipeline, steps=tuple(steps))


def _model(pipeline: Pipeline, planned: Planned, tell: Tell, progress: stream.Progress) -> Iterator[Step]:
    for verb, work in _works(pipeline, planned, progress):
        step = _taken(planned.wanted.name, verb, work)
        tell(step)
        yield step
        if step.status == "failed":
            return


def _whole(pipeline: Pipeline, tell: Tell, well: bool) -> Iterator[Step]:
    if not pipeline.repository.is_dir():
        return  # nothing is live yet
    step = _taken("", "check", lambda: _checked(pipeline.repository))
    tell(step)
    yield step
    if pipeline.remote and well and step.status != "failed":
        url = pipeline.remote
        step = _taken("", "push", lambda: _pushed(pipeline.repository, url))
        tell(step)
        yield step


def _taken(model: str, verb: str, work: Work) -> Step:
    began = time.perf_counter()
    try:
        status, said = work()
        code = 0
    except NemoportError as error:
        status, said, code = "failed", str(error), error.exit_code
    return Step(model=model, verb=verb, status=status, said=said, seconds=time.perf_counter() - began, exit_code=code)


def _works(pipeline: Pipeline, planned: Planned, progress: stream.Progress) -> Iterator[tuple[str, Work]]:
    wanted, repository, made = planned.wanted, pipeline.repository, planned.job.destination
    yield "convert", lambda: _converted(planned, progress)
    if planned.published:
        yield "publish", lambda: _published(planned, repository)
    if wanted.validate:
        yield "validate", lambda: _validated(planned, repository)
    if planned.published and wanted.promote:
        yield "promote", lambda: _promoted(planned, repository)
    if planned.published and wanted.label:
        word, version = wanted.label, str(_version(repository, wanted.name, made))
        yield f"label {word}", lambda: _labelled(repository, wanted.name, word, version)


def _converted(planned: Planned, progress: stream.Progress) -> tuple[Status, str]:
    made = stream.run(planned.job, progress)
    size = sum(file.size for file in made.files)
    return ("found done" if planned.converted else "did"), f"{len(made.files)} files, {size:,} bytes"


def _published(planned: Planned, repository: Path) -> tuple[Status, str]:
    wanted = planned.wanted
    found = publish(
        planned.job.destination,
        repository,
        wanted.name,
        max_batch_size=wanted.max_batch_size,
        triton_release=wanted.triton_release,
    )
    return ("found done" if found.already else "did"), f"version {found.version}"


def _validated(planned: Planned, repository: Path) -> tuple[Status, str]:
    """A verdict on exactly these bytes is not asked for twice."""
    made, name = planned.job.destination, planned.wanted.name
    evidence, request = made, validation.Request(subject=made)
    if planned.published:
        state, version = versions.state(repository, name), _version(repository, name, made)
        evidence = versions.evidence_of(repository, name) / str(version)
        request = validation.Request(subject=repository, model=name, version=state.directory(version))
    known = gate.verdict_of(evidence)
    if known and known.get("passed") is True and known.get("artifact") == artifact.identity(made):
        return "found done", "green"
    report = validation.validate(request)
    wrong = [check for check in report.checks if not check.passed]
    if wrong:
        first = wrong[0]
        raise CheckFailed(f"{len(wrong)} checks failed, the first: {first.name}: {first.found}; needed: {first.needed}")
    return "did", f"{len(report.checks)} checks, {report.executed_by}"


def _promoted(planned: Planned, repository: Path) -> tuple[Status, str]:
    name = planned.wanted.name
    done = promote(repository, name, str(_version(repository, name, planned.job.destination)))
    return ("found done" if done.already else "did"), f"live: {', '.join(map(str, done.live))}"


def _labelled(repository: Path, name: str, word: str, version: str) -> tuple[Status, str]:
    done = labels.label(repository, name, word, version)
    return ("found done" if done.already else "did"), f"{word}: {version}"


def _checked(repository: Path) -> tuple[Status, str]:
    report = check.check(check.Request(directory=repository))
    if not report.passed:
        first = next(each for each in report.findings if each.severity == "error")
        raise CheckFailed(f"{report.count('error')} errors, the first: {first.file}{first.place}: {first.sentence}")
    return "did", f"{report.count('warning')} warnings"


def _pushed(repository: Path, url: str) -> tuple[Status, str]:
    live = [name for name in versions.models(repository) if versions.is_live(repository, name)]
    sent = transfer.push(repository, remote.connect(url), live)
    return "did", f"{len(sent)} models to {url}"


def _version(repository: Path, name: str, made: Path) -> int:
    """That of these bytes."""
    identity, state = artifact.identity(made), versions.state(repository, name)
    for version in sorted((*state.staged, *state.unlisted, *state.live), reverse=True):
        evidence = versions.evidence_of(repository, name) / str(version)
        if (evidence / artifact.MANIFEST).is_file() and artifact.identity(evidence) == identity:
            return version
    raise AssertionError(f"{name} was published from {made}")
