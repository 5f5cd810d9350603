"""A planned pipeline done: each step once, whoever is killed, and one model's failure no other's."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from blake3 import blake3

from nemoport import __version__, artifact, check, validation
from nemoport.errors import CheckFailed, NemoportError
from nemoport.exporters import stream
from nemoport.pipeline.plan import Planned, runtime
from nemoport.pipeline.recipe import Joined, Pipeline, Wanted
from nemoport.repository import ensemble, gate, labels, remote, transfer, versions
from nemoport.repository.promote import promote
from nemoport.repository.publish import Published, publish
from nemoport.repository.stages import publish_all

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
        done = threads.map(
            lambda each: tuple(_taken_until(each.wanted.name, _works(pipeline, each, progress), tell)), planned
        )
        steps = [step for each in done for step in each]
    failed = {step.model for step in steps if step.status == "failed"}
    for joined in pipeline.ensembles:
        steps += _taken_until(joined.name, _joining(pipeline, joined, planned, failed), tell)
    steps += _whole(pipeline, tell, bool(steps) and all(step.status != "failed" for step in steps))
    return Outcome(pipeline=pipeline, steps=tuple(steps))


def _taken_until(model: str, works: Iterable[tuple[str, Work]], tell: Tell) -> Iterator[Step]:
    """One model's steps, to the first that fails."""
    for verb, work in works:
        step = _taken(model, verb, work)
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
    wanted, made = planned.wanted, planned.job.destination
    yield "convert", lambda: _converted(planned, progress)
    if planned.published and planned.staged:
        yield from _stages_going_live(pipeline.repository, wanted, made)
    elif planned.published:
        yield from _going_live(pipeline.repository, wanted, made, wanted.max_batch_size)
    elif wanted.validate:
        yield "validate", lambda: _validated(made, made, validation.Request(subject=made))


def _joining(
    pipeline: Pipeline, joined: Joined, planned: tuple[Planned, ...], failed: set[str]
) -> Iterator[tuple[str, Work]]:
    repository, artifacts = pipeline.repository, {each.wanted.name: each.job.destination for each in planned}
    yield "compose", lambda: _composed(pipeline, joined, artifacts, failed)
    batch = joined.max_batch_size
    if batch is None and not versions.evidence_of(repository, joined.name).is_dir():
        batch = min(versions.state(repository, step).config.max_batch_size for step in joined.steps)
    yield from _going_live(repository, joined, _composition(pipeline, joined, artifacts), batch)


def _going_live(
    repository: Path, wanted: Wanted | Joined, made: Path, max_batch_size: int | None
) -> Iterator[tuple[str, Work]]:
    name = wanted.name
    yield "publish", lambda: _published(repository, wanted, made, max_batch_size)
    if wanted.validate:
        yield "validate", lambda: _validated_there(repository, name, made)
    if wanted.promote:
        yield "promote", lambda: _promoted(repository, name, made)
    if wanted.label:
        word, version = wanted.label, str(_version(repository, name, made))
        yield f"label {word}", lambda: _labelled(repository, name, word, version)


def _stages_going_live(repository: Path, wanted: Wanted, made: Path) -> Iterator[tuple[str, Work]]:
    """The row is judged as it was written; its verdict goes with every stage and their ensemble."""
    if wanted.validate:
        yield "validate", lambda: _validated(made, made, validation.Request(subject=made))
    yield "publish", lambda: _stages_published(repository, wanted, made)
    if wanted.promote:
        yield "promote", lambda: _stages_promoted(repository, wanted, made)


def _converted(planned: Planned, progress: stream.Progress) -> tuple[Status, str]:
    made = stream.run(planned.job, progress)
    size = sum(file.size for file in made.files)
    return ("found done" if planned.converted else "did"), f"{len(made.files)} files, {size:,} bytes"


def _composed(
    pipeline: Pipeline, joined: Joined, artifacts: Mapping[str, Path], failed: set[str]
) -> tuple[Status, str]:
    if lost := [step for step in joined.steps if step in failed]:
        raise CheckFailed(f"{lost[0]} failed, and {joined.name} is made of it; see what was said of it")
    made = _composition(pipeline, joined, artifacts)
    known = made.is_dir()
    if not known:
        ensemble.compose(made, joined.name, [(step, artifacts[step]) for step in joined.steps])
    return ("found done" if known else "did"), " -> ".join(joined.steps)


def _composition(pipeline: Pipeline, joined: Joined, artifacts: Mapping[str, Path]) -> Path:
    """Where it lies in the cache: under a fingerprint of its members' bytes."""
    facts = [__version__, *((step, artifact.identity(artifacts[step])) for step in joined.steps)]
    return pipeline.cache / f"{joined.name}-{blake3(json.dumps(facts).encode()).hexdigest()[:16]}"


def _published(repository: Path, wanted: Wanted | Joined, made: Path, max_batch_size: int | None) -> tuple[Status, str]:
    found = publish(
        made, repository, wanted.name, max_batch_size=max_batch_size, runtime=runtime(wanted.triton_release)
    )
    return ("found done" if found.already else "did"), f"version {found.version}"


def _stages_published(repository: Path, wanted: Wanted, made: Path) -> tuple[Status, str]:
    found = _all_published(repository, wanted, made)
    said = ", ".join(f"{each.model} version {each.version}" for each in found)
    return ("found done" if all(each.already for each in found) else "did"), said


def _stages_promoted(repository: Path, wanted: Wanted, made: Path) -> tuple[Status, str]:
    """Their ensemble last."""
    found = _all_published(repository, wanted, made)
    done = [promote(repository, each.model, str(each.version)) for each in found]
    said = ", ".join(f"{each.model} version {each.version}" for each in found)
    return ("found done" if all(each.already for each in done) else "did"), f"live: {said}"


def _all_published(repository: Path, wanted: Wanted, made: Path) -> tuple[Published, ...]:
    """Publishing the same bytes again says where they are."""
    batch, meant = wanted.max_batch_size, runtime(wanted.triton_release)
    return publish_all(made, repository, wanted.name, max_batch_size=batch, runtime=meant)


def _validated_there(repository: Path, name: str, made: Path) -> tuple[Status, str]:
    state, version = versions.state(repository, name), _version(repository, name, made)
    request = validation.Request(subject=repository, model=name, version=state.directory(version))
    return _validated(made, versions.evidence_of(repository, name) / str(version), request)


def _validated(made: Path, evidence: Path, request: validation.Request) -> tuple[Status, str]:
    """A verdict on exactly these bytes is not asked for twice."""
    known = gate.verdict_of(evidence)
    if known and known.get("passed") is True and known.get("artifact") == artifact.identity(made):
        return "found done", "green"
    report = validation.validate(request)
    wrong = [check for check in report.checks if not check.passed]
    if wrong:
        first = wrong[0]
        raise CheckFailed(f"{len(wrong)} checks failed, the first: {first.name}: {first.found}; needed: {first.needed}")
    return "did", f"{len(report.checks)} checks, {report.executed_by}"


def _promoted(repository: Path, name: str, made: Path) -> tuple[Status, str]:
    done = promote(repository, name, str(_version(repository, name, made)))
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
