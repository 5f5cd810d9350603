"""What becomes of a model when its directory is loaded, and how Triton says that it failed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nemoport.errors import DamagedInput, NemoportError
from nemoport.runner.backends import ModelFailure
from nemoport.runner.directory import Fingerprint, NoVersion, find_versions, versions_to_serve
from nemoport.runner.ensembles.wiring import BadEnsemble, is_ensemble
from nemoport.runner.model import LoadOptions, ModelVersion, load, model_config
from nemoport.runner.model_config import ModelConfig
from nemoport.runner.refusal import Code, Refusal


@dataclass(frozen=True)
class Model:
    """What became of a model: versions that are ready, and what went wrong with others (None: with all of it)."""

    ready: Mapping[int, ModelVersion] = field(default_factory=dict)
    unavailable: Mapping[int | None, Exception] = field(default_factory=dict)
    seen: Fingerprint | None = None
    """The files as they were when it was loaded; None when it did not come from the repository."""
    unloaded: tuple[int, ...] = ()
    """Versions that were ready before they were unloaded, ascending."""
    scratch: Path | None = None
    """Where its files are, when a client brought them."""


def loaded_model(
    name: str,
    directories: list[Path],
    config_path: Path | None,
    options: LoadOptions,
    load_ensemble: Callable[[int, ModelConfig], ModelVersion],
) -> Model:
    try:
        if len(directories) > 1:
            raise DamagedInput(
                f"failed to poll model '{name}': not unique across all model repositories, "
                f"it is in {' and '.join(str(directory.parent) for directory in directories)}"
            )
        directory = directories[0]
        if options.admit:
            options.admit(directory)
        present = find_versions(directory)
        config = model_config(directory, directory / str(present[0]) if present else None, options, config_path)
        chosen = versions_to_serve(config, present)
        if is_ensemble(config):
            return Model({chosen[-1]: load_ensemble(chosen[-1], config)})
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


def load_refusal(name: str, unavailable: Mapping[int | None, Exception]) -> Refusal:
    whole = unavailable.get(None)
    if isinstance(whole, NoVersion | BadEnsemble):
        return Refusal(f"load failed for model '{name}': {whole}")
    if whole is not None:
        return Refusal(f"failed to load '{name}', failed to poll from model repository: {whole}", Code.INTERNAL)
    states = (f"version {v} is at UNAVAILABLE state: {reason_of(why)};" for v, why in unavailable.items())
    return Refusal(f"load failed for model '{name}': {' '.join(states)}")


def reason_of(error: Exception) -> str:
    """What a model's own code raised is internal to Triton, and everything else an argument."""
    return f"{'Internal' if isinstance(error, ModelFailure) else 'Invalid argument'}: {error}"
