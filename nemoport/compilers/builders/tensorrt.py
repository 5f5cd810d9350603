"""`tensorrt`: ONNX to `model.plan`, by TensorRT 10.15 and later, 11 included.

The network is strongly typed, as all are in 11: the precision is in the graph, and no flag changes it. What the parser
takes is checked before anything is built. A plan is of one release and one kind of GPU, but for `--version-compatible`.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from nemoport.artifact import Artifact
from nemoport.compilers import graphs, machine, profiles
from nemoport.compilers.build import ARTIFACT, PRODUCT, Build, Fact, Facts, Option, Program
from nemoport.compilers.gpu import DRIVER, SM
from nemoport.compilers.graphs import GRAPH, Part
from nemoport.compilers.options import CONTAINER, TIMING_CACHE, image
from nemoport.compilers.profiles import Bounds
from nemoport.errors import DamagedInput, UnsupportedInput, UsageError

TAKES = "onnx"
KIND, PLAN = "tensorrt", "model.plan"
SCRIPT, TRTEXEC, CACHE = "build_plan.py", "trtexec.sh", "timing.cache"
IMAGE = "nvcr.io/nvidia/tensorrt:26.07-py3"
AXIS = Option(
    name="axis",
    many=True,
    metavar="NAME=LEAST:BEST:MOST",
    help="Bounds of an axis that varies: batch, sequence (tokens at once) or past (tokens before); repeatable.",
)
REFIT = Option(name="refit", flag=True, help="Weights can be replaced in the plan.")
COMPATIBLE = Option(name="version_compatible", flag=True, help="Later releases of the same major load it too.")
LEVEL = Option(name="builder_optimization_level", kind=int, help="How long kernels are searched for, 0 to 5.")
WORKSPACE = Option(name="workspace", kind=int, metavar="MIB", help="Scratch memory of a kernel, at most.")
OPTIONS = (AXIS, REFIT, COMPATIBLE, LEVEL, WORKSPACE, TIMING_CACHE, CONTAINER)
DISTRIBUTIONS = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt_cu13_bindings", "tensorrt_cu12_bindings")
MAGIC = (b"ftrt", b"ptrt")
"""How a serialized plan begins: 0x74727466, as NVIDIA's own samples check it, and the tag before that."""
RELEASE = Fact(
    name="tensorrt",
    command="python3 -c 'import tensorrt; print(tensorrt.__version__)'",
    accepted=("10.1[5-9].*", "10.[2-9]?.*", "1[1-9].*"),
    way_out=f"its parser takes these graphs from 10.15 on: run this in a container such as {IMAGE}",
)
PYTHON = Program(name="python3", way_out=f"run this in a container with Python and tensorrt, such as {IMAGE}")


def plan(artifact: Path, made: Artifact, options: Mapping[str, Any]) -> Build:
    parts = graphs.parts(artifact, made)
    for part in parts:
        _check_parses(artifact / part.place / GRAPH)
    assert made.signature, "its parts have one"
    known = profiles.bounds(made.signature, made.spec.longest, options.get(AXIS.name, ()))
    asked = _asked(options, known)
    cache = options.get(TIMING_CACHE.name)
    return Build(
        kind=KIND,
        asked=asked,
        commands=tuple(_command(part) for part in parts),
        programs=(PYTHON, DRIVER),
        facts=(RELEASE, SM),
        container=image(options, IMAGE),
        gpus=1,
        loads=partial(loads, compatible=COMPATIBLE.name in options),
        check=partial(check, parts=parts),
        lacking=_lacking(),
        carried=graphs.beside(made),
        files={
            SCRIPT: (files("nemoport") / "templates/job" / SCRIPT).read_bytes(),
            TRTEXEC: "".join(_trtexec(part, asked) for part in parts).encode(),
            **{_settings(part): _said(part, asked) for part in parts},
        },
        kept={CACHE: cache} if cache else {},
        signature=made.signature,
        stages=made.stages,
    )


def loads(facts: Facts, *, compatible: bool) -> tuple[str, ...]:
    release, gpus = str(facts[RELEASE.name]), f"on GPUs of SM {facts[SM.name]}"
    if compatible:
        return (f"TensorRT {release} to {release.partition('.')[0]}.x {gpus} (where plans may hold code)",)
    return (f"TensorRT {release} {gpus}",)


def check(product: Path, facts: Facts, parts: tuple[Part, ...]) -> None:
    """A plan for each graph, by its first bytes: only TensorRT can say more."""
    for part in parts:
        path = product / part.place / PLAN
        try:
            with path.open("rb") as file:
                begins = file.read(4)
        except OSError as error:
            raise DamagedInput(f"{path} cannot be read ({error}); build again") from error
        if begins not in MAGIC:
            raise DamagedInput(f"{path} begins with {begins!r}, and a plan with {MAGIC[0]!r}; build again")


def _check_parses(path: Path) -> None:
    from nemoport.compilers.onnx_parser import refusals

    if refused := list(refusals(graphs.read(path, "convert again"))):
        raise UnsupportedInput(
            f"TensorRT's parser does not take {path}: {refused[0]} ({len(refused)} such nodes); "
            "convert with --profile portable, and in place of --quantize int8_dynamic with int8"
        )


def _lacking() -> str | None:
    installed = machine.version(*DISTRIBUTIONS)
    if installed is None:
        return "it has no tensorrt"
    if not machine.accepts(RELEASE, installed):
        return f"its TensorRT is {installed}, and {RELEASE.way_out}"
    return machine.lacking((PYTHON, DRIVER))


def _asked(options: Mapping[str, Any], known: Mapping[str, Bounds]) -> dict[str, Any]:
    level, workspace = options.get(LEVEL.name), options.get(WORKSPACE.name)
    if level is not None and not 0 <= level <= 5:
        raise UsageError(f"--builder-optimization-level is {level}; it goes from 0 to 5")
    if workspace is not None and workspace < 1:
        raise UsageError(f"--workspace is {workspace}; it counts MiB, from 1 on")
    return {
        "axes": {axis: [each.least, each.best, each.most] for axis, each in known.items()},
        "flags": [option.name for option in (REFIT, COMPATIBLE) if option.name in options],
        "optimization_level": level,
        "workspace": None if workspace is None else workspace << 20,
    }


def _command(part: Part) -> tuple[str, ...]:
    graph, product = f"{ARTIFACT}/{part.place}{GRAPH}", f".{PRODUCT}/{part.place}{PLAN}"
    return ("python3", SCRIPT, graph, product, _settings(part), CACHE)


def _settings(part: Part) -> str:
    return f"{part.place}settings.json"


def _said(part: Part, asked: Mapping[str, Any]) -> bytes:
    return json.dumps({**asked, "shapes": _shapes(part, asked)}, indent=1).encode() + b"\n"


def _shapes(part: Part, asked: Mapping[str, Any]) -> dict[str, list[list[int]]]:
    return profiles.shapes(part.signature, {axis: Bounds(*each) for axis, each in asked["axes"].items()})


def _trtexec(part: Part, asked: Mapping[str, Any]) -> str:
    """The same by TensorRT's own program, as a line to copy."""
    flags = {REFIT.name: "--refit", COMPATIBLE.name: "--versionCompatible"}

    def words() -> Iterator[str]:
        yield from ("trtexec", f"--onnx={ARTIFACT}/{part.place}{GRAPH}", f"--saveEngine={part.place}{PLAN}")
        yield from ("--stronglyTyped", "--noTF32", f"--timingCacheFile={CACHE}", "--skipInference")
        for number, word in enumerate(("min", "opt", "max")):
            shapes = (f"{name}:{'x'.join(map(str, each[number]))}" for name, each in _shapes(part, asked).items())
            yield f"--{word}Shapes={','.join(shapes)}"
        yield from (flags[flag] for flag in asked["flags"])
        if asked["optimization_level"] is not None:
            yield f"--builderOptimizationLevel={asked['optimization_level']}"
        if asked["workspace"] is not None:
            yield f"--memPoolSize=workspace:{asked['workspace'] >> 20}M"

    return shlex.join(words()) + "\n"
