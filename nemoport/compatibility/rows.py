"""What was seen of releases and GPUs, a row each with its source. What no source said is None.

Triton's containers are those of its own compatibility matrix. What an artifact is loaded by is not said here but in its
manifest; here is by which way it gets to an engine, in which place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

_SERVER = "https://github.com/triton-inference-server/server"
MATRIX = f"{_SERVER}/blob/e1db8a603d863b1317ee859bdeea2be19959462e/docs/introduction/compatibility.md"
_TRITON_NOTES = "https://docs.nvidia.com/deeplearning/triton-inference-server/release-notes/rel-{}.html"
_NIM = "https://docs.nvidia.com/nim/large-language-models"
CONTAINERS = f"{_SERVER}/issues/7346"
"""`-py3` has the backends for ONNX Runtime, TensorRT and PyTorch, `-trtllm` those for TensorRT-LLM and Python only; the
same is said of every container for one engine in tensorrtllm_backend#401."""


@dataclass(frozen=True)
class Triton:
    """A release, with what its containers hold: `-py3`, `-trtllm-python-py3`, `-vllm-python-py3`."""

    release: str
    onnxruntime: str | None
    tensorrt_llm: str | None
    tensorrt: str | None
    """Of the container with TensorRT-LLM, as CUDA's; what `-py3` holds was seen in no source."""
    cuda: str | None
    vllm: str | None
    vllm_cuda: str | None
    """Of the container with vLLM."""
    source: str = MATRIX


TRITON = (
    Triton("26.07", "1.27.0", "1.2.1", "10.14.1.48", "13.1.0.036", "0.24.0", "13.3.0.035"),
    Triton("26.06", "1.24.4", "1.2.1", "10.14.1.48", "13.1.0.036", "0.22.1", "13.3.0.035"),
    Triton("26.05", "1.24.4", "1.2.1", "10.14.1.48", "13.1.0.036", "0.19.0", "13.2.1.009"),
    Triton("26.04", "1.24.4", "1.2.1", "10.14.1.48", "13.1.0.036", "0.19.0", "13.2.1.009"),
    Triton("26.03", "1.24.2", "1.2.0", "10.14.1.48", "13.1.0.036", "0.17.1", "13.2.0.046"),
    Triton("26.02", "1.24.1", "1.1.0", "10.13.3.9", "13.0.2.006", "0.15.1", "13.1.1.006"),
    Triton("26.01", "1.23.2", "1.1.0", "10.13.3.9", "13.0.2.006", "0.13.0", "13.1.1.006"),
    Triton("25.12", "1.23.2", "1.1.0", "10.13.3.9", "13.0.2.006", "0.11.1", "13.1.0.036"),
    Triton("25.11", "1.23.2", "1.0.3.2510", "10.13.3.9", "13.0.2.006", "0.11.0", "13.0.2.006"),
    Triton("25.10", "1.23.1", "1.0.0", "10.11.0.33", "12.9.1.010", "0.10.2", "13.0.2.006"),
    Triton("25.09", "1.23.0", "1.0.0", "10.11.0.33", "12.9.1.010", "0.10.1.1", "13.0.1.012"),
    Triton("25.08", "1.23.0", "0.21.0", "10.11.0.33", "12.9.0.043", "0.9.2", "13.0.1.012"),
    Triton("25.07", "1.22.0", "0.20.0", "10.10.0.31", "12.9.0.036", "0.9.0rc1", "12.9.0.043"),
    Triton("25.06", "1.22.0", "0.20.0", "10.10.0.31", "12.9.0.036", "0.9.0rc1", "12.9.0.043"),
    Triton("25.05", "1.22.0", "0.19.0", "10.9.0.34", "12.8.1.012", "0.8.4", "12.9.0.043"),
    Triton("25.04", "1.21.0", "0.18.2", "10.9.0.34", "12.8.1.012", "0.8.1", "12.9.0.036"),
    Triton("25.03", "1.21.0", "0.18.0", "10.9.0.34", "12.8.1.012", "0.7.3", "12.8.1.012"),
    Triton("25.02", "1.20.1", "0.17.0.post1", "10.8.0.43", "12.8.0.038", "0.7.0", "12.8.0.038"),
    Triton("25.01", "1.20.1", "0.17.0", "10.8.0.43", "12.8.0.038", "0.6.3.post1", "12.8.0.038"),
    Triton("24.12", "1.20.1", "0.16.0", "10.7.0", "12.6.3", "0.5.5", "12.6.3.004"),
    Triton("24.11", "1.19.2", "0.15.0", "10.6.0", "12.6.3", "0.5.5", "12.6.3.001"),
    Triton("24.10", "1.19.2", "0.14.0", "10.4.0", "12.5.1.007", "0.5.5", "12.6.2.004"),
    Triton("24.09", "1.19.2", "0.13.0", "10.4.0", "12.5.1.007", "0.5.3.post1", "12.6.1.006"),
    Triton("24.08", "1.18.1", "0.12.0", "10.3.0", "12.5.1.007", "0.5.0.post1", "12.6.0.022"),
    Triton("24.07", "1.18.1", "0.11.0", "10.1.0", "12.4.1.003", "0.5.0.post1", "12.5.1"),
    Triton("24.06", "1.18.0", "0.10.0", "10.0.1", "12.4.0.041", "0.4.3", "12.5.0.23"),
    Triton("24.05", "1.18.0", "0.9.0", "10.0.1.6", "12.3.2.001", "0.4.0.post1", "12.4.1"),
    Triton("24.04", "1.17.3", "0.9.0", "9.3.0.post12.dev1", "12.3.2.001", "0.4.0.post1", "12.4.1"),
)
"""The newest first."""


ONLY: Mapping[str, tuple[str, ...]] = {"trtllm": ("tensorrtllm", "python"), "vllm": ("vllm", "python")}
"""Backends of the containers for one engine, which have no others (CONTAINERS)."""
ELSEWHERE = ("tensorrtllm", "vllm")
"""Backends that `-py3` has not."""


@dataclass(frozen=True)
class LeastSm:
    """The oldest GPUs that a release of Triton supports."""

    release: str
    sm: int
    source: str


LEAST_SM = (
    LeastSm("24.04", 60, _TRITON_NOTES.format("24-04")),
    LeastSm("24.06", 60, _TRITON_NOTES.format("24-06")),
    LeastSm("25.10", 75, _TRITON_NOTES.format("25-10")),
    LeastSm("26.02", 75, _TRITON_NOTES.format("26-02")),
    LeastSm("26.06", 75, _TRITON_NOTES.format("26-06")),
    LeastSm("26.07", 75, _TRITON_NOTES.format("26-07")),
)


@dataclass(frozen=True)
class Opset:
    """The newest opset of ai.onnx that a line of ONNX Runtime takes: 1.23 is 1.23.2 too."""

    onnxruntime: str
    opset: int
    source: str


_ORT_TABLE = (
    "https://github.com/microsoft/onnxruntime/blob/109c0baa9367a6818c00eb42d160ae3719ffb609/docs/reference/"
    "compatibility.md"
)
_WHEEL = "https://pypi.org/project/onnxruntime/{}/"
OPSETS = (
    Opset("1.31", 26, _WHEEL.format("1.31.1")),
    Opset("1.27", 26, _WHEEL.format("1.27.0")),
    Opset("1.24", 25, _WHEEL.format("1.24.4")),
    Opset("1.23", 23, _WHEEL.format("1.23.2")),
    Opset("1.22", 22, _WHEEL.format("1.22.1")),
    Opset("1.21", 22, _WHEEL.format("1.21.1")),
    Opset("1.20", 21, _ORT_TABLE),
    Opset("1.19", 21, _ORT_TABLE),
    Opset("1.18", 21, _ORT_TABLE),
    Opset("1.17", 20, _ORT_TABLE),
)
"""From 1.21 on by loading a graph of each opset in the wheel."""


@dataclass(frozen=True)
class Nim:
    """A release of NIM for LLMs, with the engines in it. Of 1.x no source says their versions."""

    release: str
    engines: Mapping[str, str | None]
    source: str


_NOTES = f"{_NIM}/{{}}/about-nim-llm/release-notes.html"
_ALL_THREE: Mapping[str, str | None] = {"vllm": None, "tensorrt_llm": None, "sglang": None}
NIM = (
    Nim("2.1.5", {"vllm": "0.31.0", "sglang": "0.5.21"}, _NOTES.format("2.1.5")),
    Nim("2.0.9", {"vllm": "0.25.1"}, _NOTES.format("2.0.9")),
    Nim("2.0.5", {"vllm": "0.20.2"}, _NOTES.format("2.0.5")),
    Nim("2.0.4", {"vllm": "0.20.0"}, _NOTES.format("2.0.4")),
    Nim("2.0.3", {"vllm": "0.19.0"}, _NOTES.format("latest")),
    Nim("2.0.2", {"vllm": "0.18.0"}, _NOTES.format("2.0.2")),
    Nim("2.0.1", {"vllm": "0.17.1"}, _NOTES.format("2.0.1")),
    Nim("1.15", _ALL_THREE, f"{_NIM}/latest/supported-architectures.html"),
    Nim("1.10", _ALL_THREE, f"{_NIM}/1.10.0/ft-support.html"),
    Nim("1.8", _ALL_THREE, f"{_NIM}/1.8.0/ft-support.html"),
)
"""The newest first. The line before 2.0 had all engines in one container (release notes of 2.0.1)."""

Place = Literal["triton", "nim", "alone"]
PLACES: Mapping[Place, str] = {"triton": "Triton", "nim": "NIM", "alone": "an engine by itself"}


@dataclass(frozen=True, kw_only=True)
class Way:
    """How an artifact of a kind gets to an engine, in one place."""

    kind: str
    place: Place
    engine: str
    first: str = ""
    """What is done before it loads; nothing where it is empty."""
    source: str


@dataclass(frozen=True, kw_only=True)
class NoWay:
    """A kind that a place does not take as it is, with what is done instead."""

    kind: str
    place: Place
    instead: str
    source: str


_TRTLLM = "https://github.com/NVIDIA/TensorRT-LLM/blob"
_LLM_API = f"{_TRTLLM}/001eaecea63dd6bdbfd02aed1bf8dc7fad567bd0/docs/source/release-notes.md"
_REMOVAL = f"{_TRTLLM}/335107a7646f9682c5e24103b11fc2b3e2c8362f/docs/source/legacy/tensorrt-backend-removal.md"
_CHECKPOINT = "https://nvidia.github.io/TensorRT-LLM/architecture/checkpoint.html"
_VLLM = "https://docs.vllm.ai/en/v0.32.0/features/quantization/llm_compressor/fp8/"
_VLLM_BACKEND = "https://github.com/triton-inference-server/vllm_backend"
_TENSORRT_MATRIX = "https://docs.nvidia.com/deeplearning/tensorrt/archives/tensorrt-1010/support-matrix/index.html"
_PARSER = "https://github.com/onnx/onnx-tensorrt/blob/release/10.15-GA/docs/operators.md"
_FINE_TUNED = f"{_NIM}/latest/ft-support.html"
_MODEL_FREE = f"{_NIM}/2.1.5/deployment/model-free-nim.html"
_COMPILE = "compile it with nemoport compile --to {}, in that release"
_LAYOUT = "lay it out with nemoport layout nim"
_AROUND = "lay it out with nemoport layout inflight_batcher_llm"
_LLMAPI = "or convert with --to llmapi"
WAYS = (
    Way(kind="hf", place="alone", engine="vllm", source=_VLLM),
    Way(kind="hf", place="alone", engine="sglang", source=_MODEL_FREE),
    Way(kind="hf", place="alone", engine="tensorrt_llm", source=_LLM_API),
    Way(kind="hf", place="nim", engine="vllm", first=_LAYOUT, source=_MODEL_FREE),
    Way(kind="hf", place="nim", engine="sglang", first=_LAYOUT, source=_MODEL_FREE),
    Way(kind="hf", place="nim", engine="tensorrt_llm", first=_LAYOUT, source=_FINE_TUNED),
    Way(kind="vllm", place="alone", engine="vllm", source=_VLLM),
    Way(kind="vllm", place="triton", engine="vllm", source=_VLLM_BACKEND),
    Way(kind="llmapi", place="alone", engine="tensorrt_llm", source=_LLM_API),
    Way(kind="llmapi", place="triton", engine="tensorrt_llm", source=_LLM_API),
    Way(kind="trtllm", place="alone", engine="tensorrt_llm", first=_COMPILE.format("trtllm"), source=_CHECKPOINT),
    Way(
        kind="trtllm",
        place="triton",
        engine="tensorrt_llm",
        first=f"{_COMPILE.format('trtllm')}, and {_AROUND}, {_LLMAPI}",
        source=_CHECKPOINT,
    ),
    Way(kind="trtllm", place="nim", engine="nim", first=_LAYOUT, source=_FINE_TUNED),
    Way(kind="trtllm_engine", place="alone", engine="tensorrt_llm", source=_REMOVAL),
    Way(kind="trtllm_engine", place="triton", engine="tensorrt_llm", first=f"{_AROUND}, {_LLMAPI}", source=_REMOVAL),
    Way(kind="trtllm_engine", place="nim", engine="tensorrt_llm", first=_LAYOUT, source=_FINE_TUNED),
    Way(kind="onnx", place="alone", engine="onnxruntime", source=_ORT_TABLE),
    Way(kind="onnx", place="alone", engine="tensorrt", first=_COMPILE.format("tensorrt"), source=_PARSER),
    Way(kind="onnx", place="triton", engine="onnxruntime", source=CONTAINERS),
    Way(kind="tensorrt", place="alone", engine="tensorrt", source=_TENSORRT_MATRIX),
    Way(kind="tensorrt", place="triton", engine="tensorrt", source=CONTAINERS),
    Way(kind="torchscript", place="triton", engine="pytorch", source=CONTAINERS),
    Way(kind="tokenizer", place="triton", engine="python", source=CONTAINERS),
    Way(kind="python", place="triton", engine="python", source=CONTAINERS),
    Way(kind="ensemble", place="triton", engine="triton", source=MATRIX),
)
NO_WAYS = (
    NoWay(kind="hf", place="triton", instead="convert with --to vllm or --to llmapi", source=_VLLM_BACKEND),
    NoWay(kind="vllm", place="nim", instead="convert with --to hf", source=_MODEL_FREE),
    NoWay(kind="llmapi", place="nim", instead="convert with --to hf", source=_MODEL_FREE),
)
KINDS = tuple(dict.fromkeys(way.kind for way in WAYS))


@dataclass(frozen=True)
class Gpu:
    name: str
    sm: int
    source: str


_RTX = "https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/getting-started/support-matrix-1/1.5.html"
_LIST = "https://gpu-ark.ru/en/cuda-compute-capability"
GPUS = (
    Gpu("v100", 70, _TENSORRT_MATRIX),
    Gpu("t4", 75, _TENSORRT_MATRIX),
    Gpu("a100", 80, _TENSORRT_MATRIX),
    Gpu("a10", 86, _TENSORRT_MATRIX),
    Gpu("l40s", 89, _TENSORRT_MATRIX),
    Gpu("h100", 90, _TENSORRT_MATRIX),
    Gpu("gh200", 90, _TENSORRT_MATRIX),
    Gpu("h200", 90, _LIST),
    Gpu("b200", 100, _LIST),
    Gpu("rtx5090", 120, _RTX),
    Gpu("gb10", 121, _RTX),
)
SM_OF: Mapping[str, int] = {gpu.name: gpu.sm for gpu in GPUS}
