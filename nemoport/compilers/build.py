"""What a builder says of one compilation, as a value: all of it is checked and nothing has been written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from nemoport.artifact import Artifact, Signature

ARTIFACT, PRODUCT = "artifact", "product"
"""The directories of a job: what is compiled, and what comes of it. A command names files below them relative to the
job, where it is run."""
Facts = Mapping[str, str | int]
"""What a product was built with, each under its name: `{"tensorrt_llm": "1.2.1", "sm": 90}`."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """One thing that a builder may be told; `max_batch_size` is `--max-batch-size` on the command line."""

    name: str
    help: str
    kind: type[int] | type[str] | type[Path] | tuple[str, ...] = str
    """What a value is; or the values that there are."""
    many: bool = False
    flag: bool = False
    metavar: str | None = None


@dataclass(frozen=True, kw_only=True)
class Program:
    """A program that a build calls."""

    name: str
    way_out: str
    """How a machine comes to have it."""


@dataclass(frozen=True, kw_only=True)
class Fact:
    """Something to know of the machine that builds, kept in the artifact's manifest."""

    name: str
    command: str
    """Shell that prints it. Digits alone are a number."""
    accepted: tuple[str, ...] = ("?*",)
    """Patterns, as the shell has them, of what may build."""
    way_out: str = ""
    """Where it is another."""


@dataclass(frozen=True, kw_only=True)
class Build:
    kind: str
    """Of the artifact that comes out."""
    asked: Mapping[str, Any]
    """What was asked for, without paths: with the artifact's identity, it says which build this is."""
    commands: tuple[tuple[str, ...], ...]
    """Run one after the other in the job's directory. Each leaves files below `product`."""
    programs: tuple[Program, ...]
    facts: tuple[Fact, ...]
    container: str
    """The image that has the programs."""
    gpus: int
    loads: Callable[[Facts], tuple[str, ...]]
    """The releases that load what was built with these."""
    check: Callable[[Path, Facts], None]
    """Raise DamagedInput or UnsupportedInput where a product is not what was asked for."""
    lacking: str | None = None
    """Why this machine cannot do it, in a clause: `it has no trtllm-build`. None: it can."""
    carried: tuple[str, ...] = ()
    """Files of the source that belong to the product too."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """More files that the job needs, by their names in it."""
    kept: Mapping[str, Path] = field(default_factory=dict)
    """Files of a job that outlive it, and where: a timing cache. One that is there already is given to the job."""
    signature: Signature | None = None
    stages: tuple[Signature, ...] = ()
    """Of a product in pipeline stages, as in `Artifact`."""
    packages: tuple[str, ...] = ()
    """What pip adds to the container first: `onnxruntime-gpu==1.31.1`."""


class Builder(Protocol):
    """A module in `builders/`. It is imported for `--help`, so what is heavy it imports where it needs it."""

    TAKES: str
    """The kind of artifact that it compiles."""
    OPTIONS: tuple[Option, ...]

    def plan(self, artifact: Path, made: Artifact, options: Mapping[str, Any]) -> Build:
        """Everything that can be checked is checked here. `options` has those that were given."""
