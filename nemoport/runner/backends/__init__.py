"""How the runner executes one kind of artifact: a module per backend, and its file name is its name in a config.

A backend module has the functions of `Backend`. It imports its engine inside them or at its top, and is itself
imported only when a model asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from nemoport import plugins
from nemoport.errors import DamagedInput, MachineError, NemoportError, UnsupportedInput
from nemoport.runner.generation.texts import Generator
from nemoport.runner.instances import Placement
from nemoport.runner.jobs import Job, Outcome
from nemoport.runner.signature import TensorSignature


class ModelFailure(NemoportError):
    """Code that a model brings fails as it is loaded."""


class DamagedModel(ModelFailure, DamagedInput):
    pass


class LackingModel(ModelFailure, MachineError):
    """It imports what this machine lacks."""


class Session(Protocol):
    """A loaded model version. `run` is called from a thread per instance, so from several at once."""

    @property
    def config(self) -> Any:
        """Triton's ModelConfig message that it runs under."""

    @property
    def inputs(self) -> Mapping[str, TensorSignature]: ...

    @property
    def outputs(self) -> Mapping[str, TensorSignature]:
        """What the file itself says of its tensors; empty for a backend whose files say nothing."""

    @property
    def computes_only(self) -> bool:
        """Whether `run` waits for nothing and holds nothing for an instance, so that any thread may call it."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Where it executes otherwise than the config asks."""

    @property
    def generator(self) -> Generator | None:
        """Text from it; None where it is no decoder with a tokenizer beside it."""

    def run(self, jobs: Sequence[Job], instance: int) -> Outcome:
        """The wanted outputs of each. BYTES are object arrays of `bytes`, both ways. `merged` makes one of a function
        from arrays to arrays."""

    def close(self) -> None:
        """Called once, after the last run."""


class Backend(Protocol):
    def gpus(self) -> tuple[int, ...]:
        """The device ids on which this backend could execute here."""

    def load(self, version_directory: Path, config: Any, placement: Placement, *, complete: bool) -> Session:
        """Load the file that `config.default_model_filename` names, and hold it against the config, which is first
        completed from it where `complete`."""


_PYTHON_BASED = ("vllm",)
"""Backends that are a program for Triton's python backend."""
PYTHON_BASED = "model.py"
"""What a config's `runtime` says of them."""


def library(backend: str) -> str:
    """The file that a backend is on Triton; as `runtime`, it says what goes without saying."""
    return PYTHON_BASED if backend in _PYTHON_BASED else f"libtriton_{backend}.so"


def check_runtime(config: Any, directory: Path) -> None:
    """Triton looks for the file that `runtime` names beside the model and among its backends (its core's
    `TritonModel::GetBackendLibraryProperties`). There are no such files here, so the backend's own alone is taken."""
    if config.runtime in ("", library(config.backend)):
        return
    kind = "Python backend based backend library" if config.runtime == PYTHON_BASED else "backend library"
    raise UnsupportedInput(
        f"unable to find {kind} '{config.runtime}' for model '{config.name}', searched: '{directory}' "
        f"'{directory.parent}' ; this runner has {library(config.backend)} for backend '{config.backend}', take the "
        "runtime away, or serve the model with a tritonserver"
    )


def find_backend(name: str, model: str) -> Backend:
    available = plugins.names(__name__)
    if name not in available:
        raise UnsupportedInput(
            f"unable to find backend library for backend '{name}', try specifying runtime on the model configuration; "
            f"model '{model}' needs a server with that backend, this runner has {', '.join(available)}"
        )
    return cast(Backend, plugins.load(__name__, name))
