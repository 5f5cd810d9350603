"""Backend and platform: who runs the model."""

from __future__ import annotations

from collections.abc import Iterator

from nemoport.check.finding import Problem, Rewrite
from nemoport.check.rules.row import Rule, nearest, some
from nemoport.check.subject import Subject
from nemoport.runner.backends import PYTHON_BASED, library
from nemoport.runner.model_config import KINDS, platforms

PLATFORMS = {platform: kind.backend for kind in KINDS for platform in kind.platforms} | {"ensemble": ""}
BACKENDS = (
    *dict.fromkeys(kind.backend for kind in KINDS),
    *("tensorrtllm", "tensorflow", "dali", "fil", "identity", "repeat", "square", "implicit_state"),
)
"""The backends of Triton's own containers and repositories."""


def no_backend(subject: Subject) -> Iterator[Problem]:
    config, name = subject.model.config, subject.model.name
    if config is None or config.backend or config.platform or config.HasField("ensemble_scheduling"):
        return
    if not subject.model.has_config and not subject.model.versions:
        return  # no model at all
    if config.default_model_filename or "." not in name:
        yield Problem(
            (), "neither backend nor platform is said, and no file tells them", "a backend", 'write backend: "..."'
        )


def unknown_platform(subject: Subject) -> Iterator[Problem]:
    model, written = subject.model, subject.model.written
    if model.config is None or written is None or not model.config.platform:
        return
    platform, backend = model.config.platform, model.config.backend
    if backend or platform == "ensemble":
        return
    repair, fix = None, f"write one of {some(PLATFORMS)}, or a backend"
    if platform in BACKENDS and model.text and (place := model.text.find(("platform",))):
        repair, fix = Rewrite(place.name.start, place.name.end, "backend"), f'write backend: "{platform}"'
    elif near := nearest(platform, PLATFORMS):
        fix = f'write platform: "{near}"'
    yield Problem(("platform",), f"there is no platform {platform}", "a platform that Triton knows", fix, repair)


def contradiction(subject: Subject) -> Iterator[Problem]:
    written = subject.model.written
    if written is None or not (written.backend and written.platform):
        return
    backend, platform = written.backend, written.platform
    if platform == "ensemble":
        yield Problem(("backend",), f"an ensemble has the backend {backend}", "none", "take the backend away")
    elif (known := platforms(backend)) and platform not in known:
        yield Problem(
            ("platform",),
            f"backend {backend} and platform {platform} contradict each other",
            f"platform {some(known)}, or none",
            "take the platform away",
        )
    elif PLATFORMS.get(platform, backend) != backend:
        yield Problem(
            ("platform",),
            f"platform {platform} is of the backend {PLATFORMS[platform]}, and backend is {backend}",
            "two that agree",
            "take away the one that is wrong",
        )


def not_a_backend(subject: Subject) -> Iterator[Problem]:
    """A platform's name, or a misspelt one."""
    for backend, near in _strange_backends(subject):
        if near:
            place = subject.model.text.find(("backend",)) if subject.model.text else None
            yield Problem(
                ("backend",),
                f"there is no backend {backend}",
                "a backend's name",
                f"write {near}",
                Rewrite(place.value.start, place.value.end, f'"{near}"') if place else None,
            )


def unknown_backend(subject: Subject) -> Iterator[Problem]:
    for backend, near in _strange_backends(subject):
        if not near:
            yield Problem(
                ("backend",),
                f"the backend {backend} is not one of Triton's",
                f"one of {some(BACKENDS, 20)}, or a backend that the server is known to have",
                f"see that libtriton_{backend}.so is in the server's backend directory or beside the model",
            )


def other_runtime(subject: Subject) -> Iterator[Problem]:
    """Of backends that are known; which files a server has beside theirs is not."""
    model = subject.model
    if model.config is None or not model.config.runtime or model.config.backend not in BACKENDS:
        return
    runtime, backend = model.config.runtime, model.config.backend
    beside = {*model.files, *(name for version in model.versions.values() for name in version.files)}
    if runtime in beside - {PYTHON_BASED} or runtime == library(backend):
        return
    if runtime == PYTHON_BASED and backend != "python":  # pytorch has one too, and a server may have others
        return
    yield Problem(
        ("runtime",),
        f"there is no {runtime} beside the model, nor in Triton's backend {backend}",
        f"{library(backend)}, or nothing",
        "take it away",
    )


def ensemble_without_platform(subject: Subject) -> Iterator[Problem]:
    config = subject.model.config
    if config is None:
        return
    if config.HasField("ensemble_scheduling") and config.platform != "ensemble":
        yield Problem(
            ("ensemble_scheduling",),
            f"ensemble_scheduling in a model whose platform is {config.platform or 'not said'}",
            'platform: "ensemble"',
            'write platform: "ensemble" and no backend',
        )
    elif config.platform == "ensemble" and not config.HasField("ensemble_scheduling"):
        yield Problem(("platform",), "an ensemble without steps", "ensemble_scheduling", "write its steps")


def _strange_backends(subject: Subject) -> Iterator[tuple[str, str | None]]:
    """With the name that was meant."""
    model = subject.model
    if model.written is None or not model.written.backend or model.written.backend in BACKENDS:
        return
    backend = model.written.backend
    file = f"libtriton_{backend}.so"
    if file in model.files or any(file in version.files for version in model.versions.values()):
        return
    yield backend, PLATFORMS.get(backend) or nearest(backend, BACKENDS)


RULES = (
    Rule("NP301", "error", "A config or a file says which backend runs the model.", no_backend),
    Rule("NP302", "error", "A platform is one that Triton knows.", unknown_platform),
    Rule("NP303", "error", "Backend and platform agree.", contradiction),
    Rule("NP304", "error", "A backend is not a misspelt one, nor a platform's name.", not_a_backend),
    Rule("NP305", "warning", "A backend is one of Triton's own, or lies beside the model.", unknown_backend),
    Rule("NP306", "error", "An ensemble has steps, and what has steps is an ensemble.", ensemble_without_platform),
    Rule("NP309", "error", "A runtime is the library of the backend, or lies beside the model.", other_runtime),
)
