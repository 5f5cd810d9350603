"""The verb `validate` for a whole repository: what nemoport made is compared with its source, and every model that is
live is loaded and asked as a client would."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from nemoport.errors import NemoportError, UsageError
from nemoport.repository import versions
from nemoport.runner.directory import find_models
from nemoport.runner.model import LoadOptions
from nemoport.validation.report import Check, Report, Section, Service, Summary
from nemoport.validation.served import served, tried
from nemoport.validation.subject import Subject, is_artifact, of_repository
from nemoport.validation.validate import Request, validate


def run(request: Request) -> Summary:
    """An artifact, the version of a model that is named, or of a repository everything."""
    if request.model is None and request.subject.is_dir() and not is_artifact(request.subject):
        return _everything(request)
    report = validate(request)
    return Summary(subject=report.subject, sections=(Section(model=report.subject, answers=report),))


def _everything(request: Request) -> Summary:
    """Every model, sorted: its newest version against its source, its live one on the runner."""
    repository = request.subject
    live = find_models([repository])
    if not (names := sorted({*live, *versions.models(repository)})):
        raise UsageError(f"{repository} holds no model and is no artifact; give a model repository or an artifact")
    answers = {name: report for name in names if (report := _answers(request, name))}
    services: dict[str, Service] = {}
    with served(repository, LoadOptions(allow_cpu_fallback=request.allow_cpu_fallback)) as door:
        for name in live:
            made = _live(repository, name)
            services[name] = tried(door, name, made.artifact.signature if made else None)
    sections = tuple(Section(model=name, answers=answers.get(name), service=services.get(name)) for name in names)
    return Summary(subject=repository.resolve().name, sections=sections)


def _answers(request: Request, name: str) -> Report | None:
    """None of a model that nemoport did not make. What keeps one from being judged fails it, and no other."""
    if (subject := _newest(request.subject, name)) is None:
        return None
    try:
        return validate(replace(request, model=name))
    except NemoportError as error:
        refused = Check(name="it can be judged", passed=False, found=str(error), needed="its source, and a runtime")
        return Report(
            subject=subject.name,
            kind=subject.artifact.kind,
            artifact="",
            source={},
            executed_by="nothing",
            checks=(refused,),
        )


def _newest(repository: Path, name: str) -> Subject | None:
    """Staged if there is one; None of a model without evidence."""
    if not versions.evidence_of(repository, name).is_dir():
        return None
    return of_repository(repository, name, None)


def _live(repository: Path, name: str) -> Subject | None:
    """The version that answers a request which names none."""
    if not versions.evidence_of(repository, name).is_dir():
        return None
    number = versions.state(repository, name).served
    if number is None or not is_artifact(versions.evidence_of(repository, name) / str(number)):
        return None
    return of_repository(repository, name, str(number))
