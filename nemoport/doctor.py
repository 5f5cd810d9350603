"""What this machine can do, and which extra or container adds the rest. Packages are looked for, and none imported."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nemoport import plugins
from nemoport.compatibility import NAMES, Version, misfit, newest_triton, version
from nemoport.runner.devices import compute_capabilities, visible_gpus

TARGETS = "nemoport.exporters.targets"
_EXTRA = "pip install 'nemoport[{}]'"


@dataclass(frozen=True, kw_only=True)
class Package:
    distributions: tuple[str, ...]
    """The names under which it may be installed."""
    added_by: str


PACKAGES = {
    "onnxruntime": Package(
        distributions=("onnxruntime-gpu", "onnxruntime"), added_by="install nemoport with its dependencies"
    ),
    "tritonclient": Package(distributions=("tritonclient",), added_by="install nemoport with its dependencies"),
    "torch": Package(distributions=("torch",), added_by=_EXTRA.format("torch")),
    "tokenizers": Package(distributions=("tokenizers",), added_by=_EXTRA.format("text")),
    "numcodecs": Package(distributions=("numcodecs",), added_by=_EXTRA.format("zarr")),
    "matplotlib": Package(distributions=("matplotlib",), added_by=_EXTRA.format("report")),
    "pynvml": Package(distributions=("nvidia-ml-py",), added_by=_EXTRA.format("gpu")),
    "fsspec": Package(distributions=("fsspec",), added_by=_EXTRA.format("remote")),
    "cryptography": Package(distributions=("cryptography",), added_by=_EXTRA.format("sign")),
    "tensorrt": Package(
        distributions=("tensorrt", "tensorrt-cu13", "tensorrt-cu12"), added_by=_EXTRA.format("tensorrt")
    ),
    "tensorrt_llm": Package(
        distributions=("tensorrt-llm", "tensorrt_llm"),
        added_by=f"run it in a container {newest_triton('trtllm', ('TensorRT-LLM',))}",
    ),
    "vllm": Package(distributions=("vllm",), added_by=f"run it in a container {newest_triton('vllm', ('vLLM',))}"),
}
"""By the name that is imported."""
PROVIDERS = {
    "CUDAExecutionProvider": "libonnxruntime_providers_cuda.so",
    "TensorrtExecutionProvider": "libonnxruntime_providers_tensorrt.so",
}
"""Of ONNX Runtime: each that is a library beside it. CPUExecutionProvider is in the package itself."""


@dataclass(frozen=True, kw_only=True)
class Ability:
    what: str
    needs: tuple[str, ...] = ()
    """Packages."""
    gpu: bool = False
    artifact: str = ""
    """The target whose releases the packages must be of."""


ABILITIES = (
    Ability(what="inspect"),
    Ability(what="convert --to hf"),
    Ability(what="convert --to trtllm"),
    Ability(what="convert --to onnx"),
    Ability(what="convert --to vllm"),
    Ability(what="convert --to llmapi"),
    Ability(what="convert --to tokenizer"),
    Ability(what="convert --to torchscript"),
    Ability(what="convert from compressed zarr", needs=("numcodecs",)),
    Ability(what="convert --quantize --calib", needs=("torch", "tokenizers")),
    Ability(what="compile --to onnxruntime", needs=("onnxruntime",)),
    Ability(what="compile --to tensorrt", needs=("tensorrt",), gpu=True),
    Ability(what="compile --to trtllm", needs=("tensorrt_llm",), gpu=True, artifact="trtllm"),
    Ability(what="layout inflight_batcher_llm"),
    Ability(what="layout nim"),
    Ability(what="validate", needs=("torch",)),
    Ability(what="validate --report with plots", needs=("matplotlib",)),
    Ability(what="publish"),
    Ability(what="check"),
    Ability(what="build", needs=("torch",)),
    Ability(what="repo"),
    Ability(what="repo push, pull, verify", needs=("fsspec",)),
    Ability(what="repo sign", needs=("cryptography",)),
    Ability(what="serve onnx", needs=("onnxruntime",), artifact="onnx"),
    Ability(what="serve text from onnx", needs=("onnxruntime", "tokenizers"), artifact="onnx"),
    Ability(what="serve hf, trtllm and vllm on the reference", needs=("torch", "tokenizers")),
    Ability(what="serve torchscript", needs=("torch",)),
    Ability(what="serve tensorrt", needs=("tensorrt", "torch"), gpu=True),
    Ability(what="serve metrics of GPUs", needs=("pynvml",), gpu=True),
    Ability(what="serve llmapi", needs=("tensorrt_llm",), gpu=True, artifact="llmapi"),
    Ability(what="vllm serve of a vllm artifact", needs=("vllm",), gpu=True),
    Ability(what="doctor"),
)


@dataclass(frozen=True, kw_only=True)
class Machine:
    python: str
    packages: Mapping[str, str | None]
    """Versions; None for what is not installed."""
    providers: tuple[str, ...]
    gpus: int
    sms: tuple[int, ...] = ()
    """Of the GPUs, 90 of a Hopper; empty where no driver can be asked."""
    disk_free: int
    """Bytes, where the command was given."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    what: str
    ok: bool
    missing: tuple[str, ...]
    way_out: tuple[str, ...]


def look(place: Path) -> Machine:
    return Machine(
        python=platform.python_version(),
        packages={name: _version(name, package) for name, package in PACKAGES.items()},
        providers=tuple(_providers()),
        gpus=len(visible_gpus()),
        sms=compute_capabilities(),
        disk_free=shutil.disk_usage(place).free,
    )


def judge(machine: Machine) -> tuple[Verdict, ...]:
    return tuple(_verdict(ability, machine) for ability in ABILITIES)


def as_json(machine: Machine) -> dict[str, Any]:
    return {"machine": asdict(machine), "abilities": [asdict(verdict) for verdict in judge(machine)]}


def lines(machine: Machine) -> Iterator[tuple[str, str]]:
    """The same for people."""
    yield "python", machine.python
    for name, found in machine.packages.items():
        yield name, found or "-"
    yield "providers", ", ".join(machine.providers) or "-"
    sms = f" (SM {', '.join(map(str, machine.sms))})" if machine.sms else ""
    yield "GPUs", f"{machine.gpus or '-'}{sms}"
    yield "disk free", f"{machine.disk_free / 2**30:.1f} GiB"
    yield "", ""
    for verdict in judge(machine):
        needs = f"needs {', '.join(verdict.missing)}: {'; '.join(verdict.way_out)}"
        yield verdict.what, "ok" if verdict.ok else needs


def engines(machine: Machine) -> Mapping[str, Version | None]:
    """Those of the packages that load artifacts; None for one that is not installed."""
    return {name: version(found) if found else None for name, found in machine.packages.items() if name in NAMES}


def _verdict(ability: Ability, machine: Machine) -> Verdict:
    lacking = [name for name in ability.needs if machine.packages[name] is None]
    no_gpu = ability.gpu and not machine.gpus
    needed = {name: version for name, version in engines(machine).items() if name in ability.needs}
    loads = plugins.load(TARGETS, ability.artifact).LOADS if ability.artifact else ()
    other = misfit(ability.artifact, loads, {}, needed, machine.sms)
    return Verdict(
        what=ability.what,
        ok=not lacking and not no_gpu and other is None,
        missing=(*lacking, *(["another release"] if other else []), *(["a GPU"] if no_gpu else [])),
        way_out=(
            *dict.fromkeys(PACKAGES[name].added_by for name in lacking),
            *([f"{other}; run it in a container {newest_triton(ability.artifact, loads)}"] if other else []),
            *(["use a machine with an NVIDIA GPU"] if no_gpu else []),
        ),
    )


def _version(name: str, package: Package) -> str | None:
    if find_spec(name) is None:
        return None
    for distribution in package.distributions:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return "of unknown version"


def _providers() -> Iterator[str]:
    found = find_spec("onnxruntime")
    if found is None or found.origin is None:
        return
    libraries = Path(found.origin).parent / "capi"
    yield from (name for name, library in PROVIDERS.items() if (libraries / library).is_file())
    yield "CPUExecutionProvider"
