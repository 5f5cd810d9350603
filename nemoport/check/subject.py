"""What rules look at: models as they lie in a repository, read once, with nothing left to ask the disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from nemoport.artifact import Artifact
from nemoport.check.graph import Graph, Tensor
from nemoport.check.text import Text
from nemoport.compatibility import Runtime
from nemoport.errors import NemoportError
from nemoport.runner.datatypes import BY_CONFIG
from nemoport.runner.directory import NoVersion, versions_to_serve
from nemoport.runner.model_config import ModelConfig, data_type, normalised, with_backend
from nemoport.runner.signature import TensorSignature, completed


@dataclass(frozen=True)
class File:
    size: int | None
    """None for a directory."""


@dataclass(frozen=True)
class Trouble:
    """Something that could not be looked at."""

    path: str
    """Relative to what is checked."""
    reason: str


@dataclass(frozen=True, kw_only=True)
class Version:
    number: int
    path: str
    files: Mapping[str, File]
    """Everything directly in it."""
    folders: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The names in it and in the directories in it, by path."""
    graphs: tuple[Graph, ...] = ()
    """What the graph and the manifest say of inputs and outputs."""
    bad_graph: Trouble | None = None
    external: Mapping[str, File] = field(default_factory=dict)
    """The files with weights that the graph names, those that are there, by the name that it uses."""
    made: Artifact | None = None
    """What the manifest of a published version says."""
    ranks: int | None = None
    """Devices that one instance of the model spans: TP x PP."""
    ranks_from: str = ""
    """Which file says so."""
    rank_files: int | None = None
    """How many `rank{N}` files its own config.json asks for."""
    troubles: tuple[Trouble, ...] = ()


@dataclass(frozen=True)
class Port:
    """An input or output as other models see it."""

    data_type: str
    dims: tuple[int, ...]
    full: tuple[int, ...]
    """With the batch axis."""
    optional: bool


@dataclass(frozen=True, kw_only=True)
class Interface:
    max_batch_size: int
    inputs: Mapping[str, Port]
    outputs: Mapping[str, Port]


@dataclass(frozen=True, kw_only=True)
class Model:
    name: str
    """The directory's."""
    config_path: str
    """Relative to what is checked; where it would be when there is none."""
    has_config: bool = False
    text: Text | None = None
    """None when there is no config, or it cannot be read."""
    directories: tuple[str, ...] = ()
    files: Mapping[str, File] = field(default_factory=dict)
    """Everything directly in the model's directory, and what else in it the config names."""
    first_files: tuple[str, ...] = ()
    """What lies in the first of the directories: Triton tells the backend from it."""
    versions: Mapping[int, Version] = field(default_factory=dict)
    troubles: tuple[Trouble, ...] = ()

    @cached_property
    def written(self) -> ModelConfig | None:
        """The config as it is written; an empty one where there is none; None where it cannot be read."""
        if self.text is not None:
            return self.text.config
        return None if self.has_config else ModelConfig()

    @cached_property
    def config(self) -> ModelConfig | None:
        """With what Triton fills in before it looks at the model's file."""
        return None if self.written is None else normalised(with_backend(self.written, self.name, self.first_files))

    @cached_property
    def served(self) -> tuple[int, ...]:
        if self.config is None:
            return ()
        try:
            return tuple(versions_to_serve(self.config, sorted(self.versions)))
        except NoVersion:
            return ()

    @cached_property
    def interface(self) -> Interface | None:
        """What an ensemble sees of it; None where that is not known without running it."""
        config = self.config
        if config is None:
            return None
        if not (config.input and config.output):
            graphs = [graph for number in self.served[-1:] for graph in self.versions[number].graphs]
            if not graphs:
                return None
            try:
                config = completed(config, _signature(graphs[0].inputs), _signature(graphs[0].outputs))
            except (NemoportError, KeyError):
                return None
        batches = config.max_batch_size > 0
        return Interface(
            max_batch_size=config.max_batch_size,
            inputs={tensor.name: _port(tensor, batches, tensor.optional) for tensor in config.input},
            outputs={tensor.name: _port(tensor, batches, False) for tensor in config.output},
        )

    @property
    def is_ensemble(self) -> bool:
        return self.config is not None and (
            self.config.platform == "ensemble" or self.config.HasField("ensemble_scheduling")
        )


@dataclass(frozen=True)
class Target:
    """The hardware that is meant: any, no GPU, or so many."""

    gpus: int | None


ANY = Target(None)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One model, among others, for one place."""

    model: Model
    models: Mapping[str, Model]
    """The whole repository."""
    target: Target
    runtime: Runtime | None
    """A release of Triton, or one of its containers; None is any."""
    broken: frozenset[str] = frozenset()
    """Models with an error, of those that this one needs."""

    @property
    def release(self) -> str | None:
        """Of Triton: 24.10."""
        return self.runtime.release if self.runtime else None


def _port(tensor: Any, batches: bool, optional: bool) -> Port:
    dims = tuple(tensor.dims)
    return Port(type_name(tensor), dims, (-1, *dims) if batches else dims, optional)


def type_name(tensor: Any) -> str:
    """TYPE_FP32; the number where the schema has no name for it."""
    try:
        return data_type(tensor)
    except KeyError:
        return str(tensor.data_type)


def _signature(tensors: Iterable[Tensor]) -> dict[str, TensorSignature]:
    return {
        tensor.name: TensorSignature(tensor.name, BY_CONFIG[tensor.data_type or ""], tensor.dims or ())
        for tensor in tensors
    }
