"""What the Triton that is meant does not have: fields of its config, backends, engines that load what is served."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nemoport.check.finding import At, Problem
from nemoport.check.rules.files import served
from nemoport.check.rules.row import Rule
from nemoport.check.subject import Subject
from nemoport.compatibility import FIELDS, PLATFORMS, VALUES, judge, lacks_backend, opset


def newer(subject: Subject) -> Iterator[Problem]:
    if subject.release is None or subject.model.written is None or subject.model.text is None:
        return
    for at, name, since in _dated(subject.model.written, ()):
        if since > subject.release:
            yield Problem(
                at,
                f"{name} came with Triton {since}",
                f"fields that {subject.release} knows",
                "take it away, or serve with a newer Triton",
            )


def newer_platform(subject: Subject) -> Iterator[Problem]:
    config, release = subject.model.config, subject.release
    if config is not None and release and (since := PLATFORMS.get(config.platform, release)) > release:
        yield Problem(
            ("platform",),
            f"the platform {config.platform} came with Triton {since}",
            f"platforms that {release} has",
            "serve with a newer Triton",
        )


def _dated(message: Any, at: At) -> Iterator[tuple[At, str, str]]:
    owner = message.DESCRIPTOR.full_name.removeprefix("inference.")
    for field, value in message.ListFields():
        place = (*at, field.name)
        if since := FIELDS.get(f"{owner}.{field.name}"):
            yield place, field.name, since
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            items: list[tuple[At, Any]] = [((*place, key, "value"), value[key]) for key in sorted(value)]
        else:
            items = (
                [((*place, number), item) for number, item in enumerate(value)]
                if field.is_repeated
                else [(place, value)]
            )
        for where, item in items:
            if hasattr(item, "ListFields"):
                yield from _dated(item, where)
            elif field.enum_type is not None and item in field.enum_type.values_by_number:
                name = field.enum_type.values_by_number[item].name
                if name in VALUES:
                    yield where, name, VALUES[name]


def not_loaded(subject: Subject) -> Iterator[Problem]:
    """A stamp that the release, or its container, does not fit."""
    if subject.runtime is None:
        return
    for version in served(subject):
        if version.made is None:
            continue
        verdict = judge(version.made.kind, version.made.loads, subject.runtime)
        if verdict.refused:
            yield Problem(
                version.path,
                f"version {version.number} {verdict}",
                "; ".join(version.made.loads),
                verdict.first or "serve it with a release that loads it, or convert it again",
            )


def no_such_backend(subject: Subject) -> Iterator[Problem]:
    config, runtime = subject.model.config, subject.runtime
    if config is None or runtime is None or not config.backend:
        return
    if all(lacks_backend(place, config.backend) for place in runtime.places):
        yield Problem(
            ("backend",),
            f"{runtime} has no backend {config.backend}",
            "a backend of the container that is meant",
            "serve it with another of Triton's containers",
        )


def newer_opset(subject: Subject) -> Iterator[Problem]:
    newest = opset(subject.runtime) if subject.runtime else None
    for version in served(subject) if newest is not None else ():
        for graph in version.graphs:
            if graph.opset is not None and newest is not None and graph.opset > newest:
                yield Problem(
                    f"{version.path}/{graph.source}",
                    f"the graph is of opset {graph.opset}",
                    f"at most {newest}, for the ONNX Runtime of {subject.runtime}",
                    "serve with a newer Triton, or export with an older opset",
                )


RULES = (
    Rule("NP807", "error", "Every field is one that the Triton that is meant knows.", newer),
    Rule("NP811", "error", "A platform is one that the Triton that is meant has.", newer_platform),
    Rule("NP808", "error", "What is served is loaded by the Triton that is meant, as its manifest says.", not_loaded),
    Rule("NP809", "error", "A backend is in the container that is meant.", no_such_backend),
    Rule("NP810", "error", "A graph's opset is one that the Triton that is meant knows.", newer_opset),
)
