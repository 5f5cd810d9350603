"""`onnxruntime`: a graph as ONNX Runtime's optimizer leaves it for one provider, so that no server optimizes it again.

What a level does: onnxruntime.ai/docs/performance/model-optimizations/graph-optimizations.html. Providers that compile
parts of a graph (TensorRT, OpenVINO) cannot leave one that is written: onnxruntime's inference_session.cc refuses it.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from nemoport.artifact import Artifact
from nemoport.compilers import graphs, machine
from nemoport.compilers.build import ARTIFACT, PRODUCT, Build, Fact, Facts, Option, Program
from nemoport.compilers.gpu import DRIVER, SM
from nemoport.compilers.graphs import GRAPH, Part
from nemoport.compilers.options import CONTAINER, image
from nemoport.errors import DamagedInput, UnsupportedInput

TAKES, KIND = "onnx", "onnx"
SCRIPT = "optimize.py"
IMAGE = "python:3.12-slim"


@dataclass(frozen=True, kw_only=True)
class Provider:
    distributions: tuple[str, ...]
    """Of Python, any of which has it."""
    package: str
    """What pip installs to have it, with the libraries that it loads."""
    dtypes: tuple[str, ...]
    """Of weights that it has kernels for."""
    gpus: int = 0


PROVIDERS = {
    "CPUExecutionProvider": Provider(
        distributions=("onnxruntime", "onnxruntime-gpu"),
        package="onnxruntime",
        dtypes=("float32", "float16"),
    ),
    "CUDAExecutionProvider": Provider(
        distributions=("onnxruntime-gpu",),
        package="onnxruntime-gpu[cuda,cudnn]",
        dtypes=("float32", "float16", "bfloat16"),
        gpus=1,
    ),
}
LEVELS = {
    "basic": "operators as before, constants folded: any provider",
    "extended": "operators of ONNX Runtime's own: {provider} alone",
    "all": "operators and layouts of ONNX Runtime's own: {provider} alone, on processors like the one it was built on",
}
"""What is left of a graph's portability."""
QUANTIZED = ("DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "MatMulNBits")
"""Operators on packed weights."""
PROVIDER = Option(name="provider", kind=tuple(PROVIDERS), help="Where it will run; the CPU's where none is said.")
LEVEL = Option(name="level", kind=tuple(LEVELS), help="How far it is optimized; extended where none is said.")
OPTIONS = (PROVIDER, LEVEL, CONTAINER)
PYTHON = Program(name="python3", way_out="run this in a container with Python and onnxruntime")
RELEASE = Fact(
    name="onnxruntime",
    command="python3 -c 'import onnxruntime; print(onnxruntime.__version__)'",
    accepted=("1.2[3-9].*", "1.[3-9]?.*"),
    way_out="graphs of opset 23 need 1.23 or later: pip install onnxruntime",
)
PROCESSOR = Fact(
    name="processor",
    command="(grep -m1 '^model name' /proc/cpuinfo || uname -m) | sed 's/.*: //'",
    way_out="run this on Linux",
)


def plan(artifact: Path, made: Artifact, options: Mapping[str, Any]) -> Build:
    name, level = options.get(PROVIDER.name, "CPUExecutionProvider"), options.get(LEVEL.name, "extended")
    provider, parts = PROVIDERS[name], graphs.parts(artifact, made)
    if made.dtype not in provider.dtypes:
        raise UnsupportedInput(
            f"{artifact} is in {made.dtype}, for which {name} has no kernels; "
            f"convert with --dtype {' or '.join(provider.dtypes)}, or choose another --provider"
        )
    for part in parts:
        _check_plain(artifact / part.place / GRAPH)
    installed = machine.version(*provider.distributions)
    programs = (PYTHON, *([DRIVER] if provider.gpus else []))
    return Build(
        kind=KIND,
        asked={PROVIDER.name: name, LEVEL.name: level},
        commands=tuple(_command(part, name, level) for part in parts),
        programs=programs,
        facts=(RELEASE, *_facts(name, provider, level)),
        container=image(options, IMAGE),
        packages=(provider.package,),
        gpus=provider.gpus,
        loads=loads,
        check=partial(check, parts=parts),
        lacking=machine.lacking(programs) if installed else f"it has no {provider.distributions[0]}",
        carried=graphs.beside(made),
        files={SCRIPT: (files("nemoport") / "templates/job" / SCRIPT).read_bytes()},
        signature=made.signature,
        stages=made.stages,
    )


def loads(facts: Facts) -> tuple[str, ...]:
    gpus = f" on GPUs of SM {facts[SM.name]}" if SM.name in facts else ""
    return (f"ONNX Runtime {facts[RELEASE.name]} or later{gpus} ({facts['portability']})",)


def check(product: Path, facts: Facts, parts: tuple[Part, ...]) -> None:
    """Every graph there, with the ends that it had and all of its weights."""
    for part in parts:
        path = product / part.place / GRAPH
        graph = graphs.read(path, "build again").graph
        for ends, wanted in ((graph.input, part.signature.inputs), (graph.output, part.signature.outputs)):
            if [end.name for end in ends] != [tensor.name for tensor in wanted]:
                raise DamagedInput(f"{path} takes or gives other tensors than the graph it was made of; build again")
        for weight in graph.initializer:
            where = {entry.key: entry.value for entry in weight.external_data}
            outside = path.with_name(where["location"]) if where else path
            if not outside.is_file() or outside.stat().st_size < _end(where):
                raise DamagedInput(f"{outside} does not hold {weight.name}; build again")


def _check_plain(path: Path) -> None:
    nodes = graphs.read(path, "convert again").graph.node
    if packed := [node for node in nodes if node.op_type in QUANTIZED]:
        raise UnsupportedInput(
            f"{path} is quantized ({packed[0].op_type} at {packed[0].name}), and what the optimizer packs anew cannot "
            "be compared with the source any more; serve it as it is: of --profile ort int4 and int8 are packed for "
            "ONNX Runtime already"
        )


def _end(where: Mapping[str, str]) -> int:
    return int(where.get("offset", 0)) + int(where.get("length", 0))


def _command(part: Part, provider: str, level: str) -> tuple[str, ...]:
    return ("python3", SCRIPT, f"{ARTIFACT}/{part.place}{GRAPH}", f".{PRODUCT}/{part.place}{GRAPH}", provider, level)


def _facts(name: str, provider: Provider, level: str) -> list[Fact]:
    found = f"import onnxruntime; print(*({name!r},) * ({name!r} in onnxruntime.get_available_providers()))"
    there = Fact(
        name="provider",
        command=f"python3 -c {shlex.quote(found)}",
        accepted=(name,),
        way_out=f"ONNX Runtime must have it: pip install {shlex.quote(provider.package)}",
    )
    portability = Fact(name="portability", command=f"echo {shlex.quote(LEVELS[level].format(provider=name))}")
    processor = SM if provider.gpus else PROCESSOR
    return [there, portability, *([processor] if level == "all" else [])]
