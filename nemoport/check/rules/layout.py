"""The tree: which directories are versions, which of them are served, whether all could be looked at."""

from __future__ import annotations

import re
from collections.abc import Iterator

from nemoport.check.finding import NewDirectory, Problem, Rewrite
from nemoport.check.rules.row import Rule, some
from nemoport.check.subject import Subject

_NEARLY_A_VERSION = re.compile(r"(?:v|ver|version)?[-_. ]?0*(\d+)(?:\.0)*", re.IGNORECASE)


def unreadable(subject: Subject) -> Iterator[Problem]:
    for trouble in subject.model.troubles:
        yield Problem(trouble.path, trouble.reason, "something that can be looked at", "mend it, or take it away")


def no_model(subject: Subject) -> Iterator[Problem]:
    """Triton takes every directory at the root for a model, and in its default mode does not start with a bad one."""
    model = subject.model
    if not model.has_config and not model.versions:
        yield Problem(
            model.name,
            f"the directory {model.name} at the root has neither a config.pbtxt nor a version",
            "nothing but models at the root of a repository",
            "move it beside the repository",
        )


def nothing_served(subject: Subject) -> Iterator[Problem]:
    model = subject.model
    if model.config is None or model.served or not (model.has_config or model.versions):
        return
    nearly = [name for name in model.directories if _nearly(name)]
    if nearly and not model.versions:
        wanted = f"rename {nearly[0]} to {_nearly(nearly[0])}"
    elif model.versions:
        wanted = f"let the policy serve one of {some(map(str, sorted(model.versions)))}"
    else:
        wanted = "make the directory 1"
    repair = NewDirectory(f"{model.name}/1") if model.is_ensemble and not model.versions and not nearly else None
    yield Problem(
        ("version_policy",) if model.versions else model.name,
        f"no version is served: the version directories are {some(map(str, sorted(model.versions)))}",
        "one version or more under the version policy",
        wanted,
        repair,
    )


def not_a_version(subject: Subject) -> Iterator[Problem]:
    model = subject.model
    for name in model.directories if model.versions else ():
        if number := _nearly(name):
            yield Problem(
                f"{model.name}/{name}",
                f"the directory {name} is not served: its name is not a number as Triton writes one",
                "a whole number without leading zeros",
                f"rename it to {number}, or to staging-{number} while it shall not be served",
            )


def absent_version(subject: Subject) -> Iterator[Problem]:
    """Triton serves the others and says nothing."""
    model = subject.model
    if model.config is None or not model.config.version_policy.HasField("specific"):
        return
    for at, number in enumerate(model.config.version_policy.specific.versions):
        if number not in model.versions:
            yield Problem(
                ("version_policy", "specific", "versions", at),
                f"version {number} is listed and is not there",
                f"one of {some(map(str, sorted(model.versions)))}",
                "bring the version, or take its number away",
            )


def other_name(subject: Subject) -> Iterator[Problem]:
    model = subject.model
    if model.written is not None and model.written.name and model.written.name != model.name:
        place = model.text.find(("name",)) if model.text else None
        yield Problem(
            ("name",),
            f"the config's name is {model.written.name}",
            f"{model.name}, as the directory is called",
            f"write {model.name}, or take the line away",
            Rewrite(place.value.start, place.value.end, f'"{model.name}"') if place else None,
        )


def _nearly(name: str) -> str | None:
    match = _NEARLY_A_VERSION.fullmatch(name)
    return str(int(match[1])) if match and name != str(int(match[1])) else None


RULES = (
    Rule("NP201", "error", "Everything that a server reads can be read.", unreadable),
    Rule("NP202", "error", "Nothing but models lies at the root of a repository.", no_model),
    Rule("NP203", "error", "The version policy serves at least one version.", nothing_served),
    Rule("NP204", "warning", "A directory that is meant as a version is named by a plain number.", not_a_version),
    Rule(
        "NP205", "error", "Every version that the policy lists is there; Triton leaves it out silently.", absent_version
    ),
    Rule("NP206", "error", "A model's name is its directory's.", other_name),
)
