"""The models that are served, their states, and the way of a request to one of them. No protocol, no sockets."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

from nemoport.errors import DamagedInput, MachineError
from nemoport.runner.directory import AwayRepository, Fingerprint, find_models, fingerprint
from nemoport.runner.ensembles.wiring import BadEnsemble, members
from nemoport.runner.loading import Model, load_refusal, loaded_model, reason_of
from nemoport.runner.log_settings import LogSettings
from nemoport.runner.model import DEFAULTS, LoadOptions, ModelVersion, load_ensemble
from nemoport.runner.model_config import ModelConfig
from nemoport.runner.name_locks import NameLocks, WaitsForItself
from nemoport.runner.overrides import NONE, Overrides, placed_files
from nemoport.runner.refusal import Code, Refusal
from nemoport.runner.request import InferRequest, InferResponse

log = logging.getLogger(__name__)

EXTENSIONS = (
    "model_repository",
    "model_repository(unload_dependents)",
    "schedule_policy",
    "model_configuration",
    "binary_tensor_data",
    "parameters",
    "statistics",
    "logging",
    "generate",
)
"""Of the protocol; those that are not here are not done."""


@dataclass(frozen=True)
class Changes:
    changed: tuple[str, ...]
    gone: tuple[str, ...]


class Server:
    """Holds `Model` values by name; a load or an unload replaces them all by a dictionary with one exchanged, so
    requests read without a lock."""

    def __init__(
        self,
        repositories: Iterable[Path] = (),
        options: LoadOptions = DEFAULTS,
        *,
        explicit: bool = False,
        strict_readiness: bool = True,
        name: str = "nemoport",
        log_settings: LogSettings | None = None,
    ) -> None:
        self.repositories, self.options = tuple(repositories), options
        self.explicit, self.strict_readiness = explicit, strict_readiness
        self.name, self.log_settings = name, log_settings or LogSettings()
        self._models: Mapping[str, Model] = {}
        self._exchanging = Lock()
        self._loading = NameLocks()

    def ready(self) -> bool:
        return not self.strict_readiness or all(not model.unavailable for model in self._models.values())

    def find(self, name: str, version: int | None = None) -> ModelVersion:
        """The version asked for, or the highest that is ready."""
        model = self._models.get(name)
        if model is None or (version is None and not model.ready and None in model.unavailable):
            raise Refusal(f"Request for unknown model: '{name}' is not found", Code.NOT_FOUND)
        if version is None:
            if not model.ready:
                raise Refusal(f"Request for unknown model: '{name}' has no available versions", Code.NOT_FOUND)
            return model.ready[max(model.ready)]
        if version in model.ready:
            return model.ready[version]
        if version in model.unavailable or version in model.unloaded:
            raise Refusal(
                f"Request for unknown model: '{name}' version {version} is not at ready state", Code.UNAVAILABLE
            )
        raise Refusal(f"Request for unknown model: '{name}' version {version} is not found", Code.NOT_FOUND)

    def infer(self, name: str, request: InferRequest, version: int | None = None) -> InferResponse:
        return self.find(name, version).infer(request)

    def metadata(self, name: str, version: int | None = None) -> dict[str, Any]:
        found = self.find(name, version)
        return found.metadata(sorted(self._models.get(name, Model()).ready) if version is None else [version])

    def statistics(self, name: str = "", version: int | None = None) -> list[dict[str, Any]]:
        """A row per version that is ready; of all models when none is named."""
        if name:
            try:
                self.find(name, version)
            except Refusal as refusal:
                there = name in self._models and version is not None
                told = (
                    f"model version is not available for model '{name}'"
                    if there
                    else f"model '{name}' is not available"
                )
                raise Refusal(f"requested {told}") from refusal
        models = {name: self._models.get(name, Model())} if name else self._models
        return [
            ready.statistics.as_json(of, number)
            for of, model in sorted(models.items())
            for number, ready in sorted(model.ready.items())
            if version in (None, number)
        ]

    def ready_versions(self) -> list[tuple[str, int, ModelVersion]]:
        """Name, number and version of each that is ready."""
        models = sorted(self._models.items())
        return [(name, number, ready) for name, model in models for number, ready in model.ready.items()]

    def index(self, only_ready: bool = False) -> list[dict[str, str]]:
        """A row per version; a model that was never loaded has a name only. One that is ready otherwise than its
        config asks, on the CPU say or without an accelerator, has that as its reason."""
        try:
            found = find_models(self.repositories)
        except AwayRepository as away:
            raise Refusal(f"failed to open directory {away.repository}", Code.INTERNAL) from away
        rows: list[dict[str, str]] = []
        for name in sorted({*found, *self._models}):
            model = self._models.get(name, Model())
            states: dict[int | None, tuple[str, str]]
            states = {number: ("READY", "; ".join(ready.placement.notes)) for number, ready in model.ready.items()}
            states |= {version: ("UNAVAILABLE", reason_of(error)) for version, error in model.unavailable.items()}
            states |= dict.fromkeys(model.unloaded, ("UNAVAILABLE", "unloaded"))
            for version, (state, reason) in sorted(states.items(), key=lambda row: row[0] or 0):
                row = {"name": name, "version": "" if version is None else str(version), "state": state}
                rows.append({**row, "reason": reason} if reason else row)
            if not states:
                rows.append({"name": name})
        return [row for row in rows if not only_ready or row.get("state") == "READY"]

    def under_way(self) -> list[str]:
        """What keeps the server from ending, in words."""
        busy = (f"requests of '{name}' version {number}" for name, number, v in self.ready_versions() if v.is_busy())
        return [*(f"the load of '{name}'" for name in self._loading.names()), *busy]

    def check_control(self) -> None:
        """Refuses unless clients may load and unload."""
        if not self.explicit:
            raise Refusal(
                "explicit model load / unload is not allowed if polling is enabled; "
                "start the server with --model-control-mode=explicit",
                Code.UNAVAILABLE,
            )

    def adopt(self, version: ModelVersion) -> None:
        """Serve a version that `load_version` gave, beside what is served already."""
        with self._loading.held(version.name):
            ready = self._models.get(version.name, Model()).ready
            self._exchange(version.name, Model({**ready, version.version: version}))

    def load(self, name: str, overrides: Overrides = NONE) -> None:
        """Load or reload; when a version fails, none of this load is served, and what was served before stays. The
        server is not ready then until a load of it succeeds, as Triton has it.

        Without overrides nothing is done when the files are those of the last load: also an overridden config stays.
        """
        directories = self._directories(name)
        if not directories and not overrides.files:
            raise Refusal(f"failed to load '{name}', failed to poll from model repository", Code.INTERNAL)
        with self._loading.held(name):
            before = self._models.get(name, Model())
            seen = None if overrides.files else tuple(each for place in directories for each in fingerprint(place))
            if before.ready and seen is not None and seen == before.seen and not overrides:
                return
            loaded = self._loaded(name, directories, overrides, seen)
            if loaded.ready or not before.ready:
                self._exchange(name, replace(loaded, unloaded=_left_of(before, loaded)))
                _let_go(before)
            else:
                served = {None, *before.ready}
                kept = {number: why for number, why in loaded.unavailable.items() if number not in served}
                self._exchange(name, replace(before, seen=seen, unavailable=kept))
                _let_go(loaded)
        if loaded.unavailable:
            raise load_refusal(name, loaded.unavailable)
        log.info("successfully loaded '%s'", name)

    def _directories(self, name: str) -> list[Path]:
        """Of a model, in the repositories that are there."""
        found: list[Path] = []
        for repository in self.repositories:
            try:
                found += find_models([repository]).get(name, [])
            except AwayRepository as away:
                log.error("%s", away)
        return found

    def changed(self) -> Changes:
        """What the repositories have otherwise than at the last load."""
        found = find_models(self.repositories)
        changed = []
        for name, places in found.items():
            seen = tuple(each for place in places for each in fingerprint(place))
            if name not in self._models or self._models[name].seen != seen:
                changed.append(name)
        gone = (
            name for name, model in self._models.items() if name not in found and (model.ready or model.unavailable)
        )
        return Changes(tuple(changed), tuple(gone))

    def _loaded(self, name: str, directories: list[Path], overrides: Overrides, seen: Fingerprint | None) -> Model:
        if not overrides:
            return replace(loaded_model(name, directories, None, self.options, self._load_ensemble), seen=seen)
        scratch, directory = placed_files(name, overrides)
        places = [directory] if overrides.files else directories
        config = directory / "config.pbtxt"
        loaded = loaded_model(name, places, config, self.options, self._load_ensemble)
        if overrides.files:
            return replace(loaded, scratch=scratch)
        shutil.rmtree(scratch, ignore_errors=True)
        return replace(loaded, seen=seen)

    def unload(self, name: str, *, with_members: bool = False) -> None:
        """Requests under way finish; a name that is not served is not an error. Ensembles go with their members, and
        members with their ensemble when asked for."""
        with self._loading.held(name):
            unloaded = self._models.get(name, Model())
            told = unloaded.unloaded or (unloaded.ready and unloaded.seen is not None)
            self._exchange(name, Model(unloaded=_left_of(unloaded, Model())) if told else None)
            dependent = [of for of, model in self._models.items() if name in _members(model)]
        _let_go(unloaded)
        for other in [*dependent, *(_members(unloaded) if with_members else ())]:
            self.unload(other)

    def _load_ensemble(self, version: int, config: ModelConfig) -> ModelVersion:
        """Members that are not there are loaded first."""
        for member in members(config):
            if not self._models.get(member, Model()).ready:
                try:
                    self.load(member)
                except WaitsForItself as circle:  # also where another thread loads the rest of the circle
                    path = f"{circle.held[0]} -> ... -> {circle.held[-1]} -> {member}"
                    raise BadEnsemble(f"circular dependency between ensembles: {path}") from None
                except Refusal as refusal:
                    log.error("%s", refusal)
        return load_ensemble(version, config, self.find)

    def _exchange(self, name: str, model: Model | None) -> None:
        """None takes it out."""
        with self._exchanging:
            others = {of: other for of, other in self._models.items() if of != name}
            self._models = others if model is None else {**others, name: model}

    def close(self) -> None:
        """Unload everything: requests that wait are executed, and the models say goodbye."""
        for name in list(self._models):
            for version in self._models.get(name, Model()).ready.values():
                version.close()
            self.unload(name)

    def has_tried(self, name: str) -> bool:
        return name in self._models

    def failures(self) -> dict[str, Exception]:
        """The first thing that went wrong, of each model that is not as it should be."""
        return {name: next(iter(m.unavailable.values())) for name, m in self._models.items() if m.unavailable}


def _members(model: Model) -> set[str]:
    return {member for version in model.ready.values() for member in members(version.config)}


def _left_of(before: Model, now: Model) -> tuple[int, ...]:
    """Versions that were ready once and are not served any more."""
    return tuple(sorted({*before.ready, *before.unloaded} - {*now.ready, *now.unavailable}))


def _let_go(model: Model) -> None:
    """Requests that have found it are answered; it ends with the last who holds it."""
    if model.scratch is not None:
        shutil.rmtree(model.scratch, ignore_errors=True)


def start(
    repositories: Iterable[Path],
    options: LoadOptions = DEFAULTS,
    *,
    explicit: bool = False,
    load_model: Iterable[str] = (),
    exit_on_error: bool = True,
    strict_readiness: bool = True,
    name: str = "nemoport",
    log_settings: LogSettings | None = None,
) -> Server:
    """A server with its models loaded: all of them, or when `explicit`, those named (`*` alone names all).

    A model that does not load stops the start, unless `exit_on_error` is false: then the index tells why.
    """
    server = Server(
        repositories,
        options,
        explicit=explicit,
        strict_readiness=strict_readiness,
        name=name,
        log_settings=log_settings,
    )
    found, wanted = list(find_models(server.repositories)), list(load_model)
    if not explicit or wanted == ["*"]:
        wanted = found
    absent = [name for name in wanted if name not in found]
    for name in wanted:
        if server.has_tried(name):
            continue  # it is a member of an ensemble that came before
        try:
            server.load(name)
        except Refusal as refusal:
            log.error("%s", refusal)
    failures = server.failures()
    if exit_on_error and (failures or absent):
        reasons = [f"{name}: not in any repository" for name in absent]
        reasons += [f"{name}: {error}" for name, error in failures.items()]
        machine_only = not absent and all(isinstance(error, MachineError) for error in failures.values())
        raise (MachineError if machine_only else DamagedInput)(
            f"failed to load {len(reasons)} of {len(wanted)} models: {'; '.join(reasons)} "
            "(--exit-on-error=false serves the others)"
        )
    return server
