"""The models that are served, their states, and the way of a request to one of them. No protocol, no sockets."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from nemoport.errors import DamagedInput, MachineError, NemoportError
from nemoport.runner.directory import NoVersion, find_models, find_versions, versions_to_serve
from nemoport.runner.model import DEFAULTS, LoadOptions, ModelVersion, load, model_config
from nemoport.runner.refusal import Code, Refusal
from nemoport.runner.request import InferRequest, InferResponse

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Model:
    """What became of a model: versions that are ready, and what went wrong with others (None: with all of it)."""

    ready: Mapping[int, ModelVersion] = field(default_factory=dict)
    unavailable: Mapping[int | None, Exception] = field(default_factory=dict)


class Server:
    """Holds `Model` values by name; a load or an unload replaces one, so requests read without a lock."""

    def __init__(
        self,
        repositories: Iterable[Path] = (),
        options: LoadOptions = DEFAULTS,
        *,
        explicit: bool = False,
        strict_readiness: bool = True,
    ) -> None:
        self.repositories, self.options = tuple(repositories), options
        self.explicit, self.strict_readiness = explicit, strict_readiness
        self._models: dict[str, Model] = {}
        self._loading = Lock()

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
        if version in model.unavailable:
            raise Refusal(
                f"Request for unknown model: '{name}' version {version} is not at ready state", Code.UNAVAILABLE
            )
        raise Refusal(f"Request for unknown model: '{name}' version {version} is not found", Code.NOT_FOUND)

    def infer(self, name: str, request: InferRequest, version: int | None = None) -> InferResponse:
        return self.find(name, version).infer(request)

    def metadata(self, name: str, version: int | None = None) -> dict[str, Any]:
        found = self.find(name, version)
        return found.metadata(sorted(self._models.get(name, Model()).ready) if version is None else [version])

    def index(self) -> list[dict[str, str]]:
        """A row per version; a model that was never loaded has a name only."""
        rows: list[dict[str, str]] = []
        for name in sorted({*find_models(self.repositories), *self._models}):
            model = self._models.get(name, Model())
            states: dict[int | None, tuple[str, str]] = dict.fromkeys(model.ready, ("READY", ""))
            states |= {version: ("UNAVAILABLE", _reason(error)) for version, error in model.unavailable.items()}
            for version, (state, reason) in sorted(states.items(), key=lambda row: row[0] or 0):
                row = {"name": name, "version": "" if version is None else str(version), "state": state}
                rows.append({**row, "reason": reason} if reason else row)
            if not states:
                rows.append({"name": name})
        return rows

    def adopt(self, version: ModelVersion) -> None:
        """Serve a version that `load_version` gave, beside what is served already."""
        with self._loading:
            ready = self._models.get(version.name, Model()).ready
            self._models[version.name] = Model({**ready, version.version: version})

    def load(self, name: str) -> None:
        """Load or reload; when a version fails, none of this load is served, and what was served before stays."""
        directories = find_models(self.repositories).get(name)
        if not directories:
            raise Refusal(f"failed to load '{name}', failed to poll from model repository", Code.INTERNAL)
        with self._loading:
            loaded = _loaded(name, directories, self.options)
            if loaded.ready or not self._models.get(name, Model()).ready:
                self._models[name] = loaded
        if loaded.unavailable:
            raise _load_refusal(name, loaded.unavailable)
        log.info("successfully loaded '%s'", name)

    def unload(self, name: str) -> None:
        """Requests under way finish; a name that is not served is not an error."""
        with self._loading:
            self._models.pop(name, None)

    def failures(self) -> dict[str, Exception]:
        """The first thing that went wrong, of each model that is not as it should be."""
        return {name: next(iter(m.unavailable.values())) for name, m in self._models.items() if m.unavailable}


def start(
    repositories: Iterable[Path],
    options: LoadOptions = DEFAULTS,
    *,
    explicit: bool = False,
    load_model: Iterable[str] = (),
    exit_on_error: bool = True,
    strict_readiness: bool = True,
) -> Server:
    """A server with its models loaded: all of them, or when `explicit`, those named (`*` alone names all).

    A model that does not load stops the start, unless `exit_on_error` is false: then the index tells why.
    """
    server = Server(repositories, options, explicit=explicit, strict_readiness=strict_readiness)
    found, wanted = list(find_models(server.repositories)), list(load_model)
    if not explicit or wanted == ["*"]:
        wanted = found
    absent = [name for name in wanted if name not in found]
    for name in wanted:
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


def _loaded(name: str, directories: list[Path], options: LoadOptions) -> Model:
    try:
        if len(directories) > 1:
            raise DamagedInput(
                f"failed to poll model '{name}': not unique across all model repositories, "
                f"it is in {' and '.join(str(directory.parent) for directory in directories)}"
            )
        directory = directories[0]
        present = find_versions(directory)
        config = model_config(directory, directory / str(present[0]) if present else None, options)
        chosen = versions_to_serve(config, present)
    except (NemoportError, OSError) as error:
        return Model(unavailable={None: error})
    ready: dict[int, ModelVersion] = {}
    unavailable: dict[int | None, Exception] = {}
    for version in chosen:
        try:
            ready[version] = load(directory / str(version), version, config, options)
        except (NemoportError, OSError) as error:
            unavailable[version] = error
    return Model(ready) if not unavailable else Model(unavailable=unavailable)


def _load_refusal(name: str, unavailable: Mapping[int | None, Exception]) -> Refusal:
    whole = unavailable.get(None)
    if isinstance(whole, NoVersion):
        return Refusal(f"load failed for model '{name}': {whole}")
    if whole is not None:
        return Refusal(f"failed to load '{name}', failed to poll from model repository: {whole}", Code.INTERNAL)
    states = (f"version {v} is at UNAVAILABLE state: {_reason(why)};" for v, why in unavailable.items())
    return Refusal(f"load failed for model '{name}': {' '.join(states)}")


def _reason(error: Exception) -> str:
    return f"Invalid argument: {error}"
