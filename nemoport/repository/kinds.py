"""How Triton serves each kind of artifact: a row a kind, and what of a config follows from the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nemoport.artifact import Artifact, Tensor
from nemoport.compatibility import instead
from nemoport.errors import DamagedInput, UnsupportedInput, UsageError

BATCH = "batch"
"""The name of the axis that Triton batches over, in a signature."""
PAST = "past"
"""The name of the axis that a cache of keys and values grows along."""
WARM_LENGTH = 8
"""What an axis that varies has in a warm-up request: long enough to run every kernel, short enough to cost nothing."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    backend: str
    file: str
    """What the backend loads from a version's directory."""
    filename: str
    """The same, where the config names it."""
    instances: str
    """Where copies of the model run. KIND_AUTO is every GPU, or the CPU where there is none; empty where nothing of its
    own runs."""
    graph: bool
    """Batches of it can be merged and warmed up by the server: a graph, whose items do not know of each other. Other
    kinds are programs, which arrange that themselves."""
    completes: bool = False
    """The backend itself says what goes in and out; the config need not."""
    parameters: Mapping[str, str] = field(default_factory=dict)
    """What the backend is told."""


KINDS = {
    "onnx": Kind(backend="onnxruntime", file="model.onnx", filename="model.onnx", instances="KIND_AUTO", graph=True),
    # Triton's pytorch backend infers in INFERENCE_MODE by itself; weights it loads once an instance, if not told this.
    "torchscript": Kind(
        backend="pytorch",
        file="model.pt",
        filename="model.pt",
        instances="KIND_AUTO",
        graph=True,
        parameters={"ENABLE_WEIGHT_SHARING": "true"},
    ),
    "tensorrt": Kind(backend="tensorrt", file="model.plan", filename="model.plan", instances="KIND_GPU", graph=True),
    "python": Kind(
        backend="python", file="model.py", filename="model.py", instances="KIND_CPU", graph=False, completes=True
    ),
    "tokenizer": Kind(backend="python", file="model.py", filename="model.py", instances="KIND_CPU", graph=False),
    # Its file says for people what the config says for Triton, which wants no more of a version than its directory.
    "ensemble": Kind(backend="", file="ensemble.json", filename="", instances="", graph=False),
    # The parent process needs no GPU: its ranks take those that model.yaml gives them.
    "llmapi": Kind(
        backend="python", file="model.py", filename="model.py", instances="KIND_CPU", graph=False, completes=True
    ),
    # The engine places itself: vLLM's backend wants KIND_MODEL, and reads model.json by its own name.
    "vllm": Kind(backend="vllm", file="model.json", filename="", instances="KIND_MODEL", graph=False, completes=True),
}
PROVIDERS = {"CPUExecutionProvider": "KIND_CPU", "CUDAExecutionProvider": "KIND_GPU"}
"""Where a graph runs that was compiled for one of ONNX Runtime's providers."""


def kind_of(made: Artifact) -> Kind:
    if made.kind not in KINDS:
        way_out = instead(made.kind, "triton") or f"those that can are {', '.join(KINDS)}"
        raise UnsupportedInput(f"an artifact of kind {made.kind} cannot be published: {way_out}")
    kind = KINDS[made.kind]
    if made.stages:
        raise UsageError(f"the artifact is {len(made.stages)} pipeline stages, each a model of its own; publish it")
    if kind.file not in {file.path for file in made.files}:
        raise DamagedInput(f"the {made.kind} artifact has no {kind.file}; convert again")
    if made.signature is None and not kind.completes:
        raise DamagedInput(f"the {made.kind} artifact has no signature; convert again")
    return kind


def batches(made: Artifact) -> bool:
    """Every tensor's first axis is called `batch`."""
    return made.signature is not None and all(tensor.shape[:1] == (BATCH,) for tensor in _tensors(made))


def built_for(made: Artifact) -> Mapping[str, tuple[int, int, int]]:
    """Of a plan, the least, the best and the most of each axis that varies; nothing of what takes all."""
    axes = made.source.get("compiled", {}).get("asked", {}).get("axes", {})
    return {axis: (least, best, most) for axis, (least, best, most) in axes.items()}


def tuning(made: Artifact, max_batch_size: int, data_types: dict[str, str]) -> dict[str, Any]:
    """The fields of a config that are a choice, in protobuf's JSON. A cache that comes in and goes out belongs to one
    request: such a model is asked one step at a time, and merging requests of different lengths is not possible."""
    kind = kind_of(made)
    instances = kind.instances and PROVIDERS.get(made.built_with.get("provider", ""), kind.instances)
    fields: dict[str, Any] = {"instance_group": [{"count": 1, "kind": instances}]} if instances else {}
    if kind.parameters:
        fields["parameters"] = {name: {"string_value": value} for name, value in kind.parameters.items()}
    if kind.graph and not any(PAST in tensor.shape for tensor in _tensors(made)):
        if max_batch_size > 1:
            fields["dynamic_batching"] = {}
        sizes = sorted({1, max_batch_size}) if max_batch_size else [0]
        fields["model_warmup"] = [_warm_up(made, size, data_types) for size in sizes]
    return fields


def _warm_up(made: Artifact, batch: int, data_types: dict[str, str]) -> dict[str, Any]:
    assert made.signature
    best = {axis: numbers[1] for axis, numbers in built_for(made).items()}
    rows = {
        tensor.name: {
            "data_type": data_types[tensor.dtype],
            "dims": [
                str(best.get(axis, WARM_LENGTH) if isinstance(axis, str) else axis)
                for axis in (tensor.shape[1:] if batch else tensor.shape)
            ],
            "zero_data": True,
        }
        for tensor in made.signature.inputs
    }
    return {"name": f"batch of {batch}" if batch else "one request", "batch_size": batch or 1, "inputs": rows}


def _tensors(made: Artifact) -> tuple[Tensor, ...]:
    return (*made.signature.inputs, *made.signature.outputs) if made.signature else ()
