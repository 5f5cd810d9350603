"""What Triton refuses in a config before it looks at the model, in its words."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nemoport.errors import DamagedInput, UnsupportedInput
from nemoport.runner.ensembles.wiring import check_wiring, is_ensemble
from nemoport.runner.model_config import KINDS, ModelConfig, platforms

REFUSED = {  # fields whose meaning this runner cannot keep, with what they would need
    "sequence_batching": "sequence batching",
    "batch_input": "ragged batching",
    "batch_output": "ragged batching",
    "model_repository_agents": "repository agents",
}
NOT_EXERCISED: dict[str, tuple[str, Callable[[ModelConfig], object]]] = {  # how fast an answer comes, not what it says
    "response_cache": ("responses are not cached", lambda c: c.HasField("response_cache")),
    "rate_limiter": ("executions are not limited", lambda c: any(g.HasField("rate_limiter") for g in c.instance_group)),
    "host_policy": ("host policies are not kept", lambda c: any(group.host_policy for group in c.instance_group)),
    "execution_accelerators": (
        "only graphs of ONNX have them",
        lambda c: c.optimization.HasField("execution_accelerators") and c.backend != "onnxruntime",
    ),
    "cuda": ("CUDA graphs are not made", lambda c: c.optimization.HasField("cuda")),
    "priority": ("all models have the same priority", lambda c: c.optimization.priority),
}

DECOUPLED = ("python", "reference", "vllm")
"""Backends whose models may answer a request any number of times."""
EXECUTED_BY = "executed_by"
"""The parameter in which a backend says that something else than its name tells executes the model."""


def check_config(config: ModelConfig, directory_name: str) -> None:
    """Everything but the tensors, which may still have to be completed from the model."""
    _check_backend(config)
    if config.name != directory_name:
        raise DamagedInput(
            f"unexpected directory name '{directory_name}' for model '{config.name}', "
            "directory name must equal model name"
        )
    if config.max_batch_size < 0:
        raise DamagedInput(f"'max_batch_size' must be non-negative value for {config.name}")
    for size in config.dynamic_batching.preferred_batch_size:
        if size <= 0:
            raise DamagedInput(f"dynamic batching preferred size must be positive for {config.name}")
        if size > config.max_batch_size:
            raise DamagedInput(f"dynamic batching preferred size must be <= max batch size for {config.name}")
    _check_queue(config)
    if config.response_cache.enable and config.model_transaction_policy.decoupled:
        raise DamagedInput(
            f"Response Cache does not currently support model {config.name} with 'decoupled' transaction policy. "
            "Please disable the response cache."
        )
    given = {field.name for field, _ in config.ListFields()}
    for field in sorted(given & REFUSED.keys()):
        raise UnsupportedInput(f"model '{config.name}' asks for {REFUSED[field]} ({field}), which this runner lacks")
    if config.model_transaction_policy.decoupled and config.backend not in DECOUPLED and not is_ensemble(config):
        raise UnsupportedInput(
            f"model '{config.name}' is decoupled, which this runner does for {', '.join(DECOUPLED)} models only"
        )


def check_labels(config: ModelConfig, model: Path) -> None:
    """The files of labels are there; nothing here reads them, and Triton does as it loads."""
    for tensor in config.output:
        if tensor.label_filename and not (path := model / tensor.label_filename).is_file():
            raise DamagedInput(
                f"failed to open text file for read {path}, the labels of output '{tensor.name}' of {config.name}; "
                "put it there, or leave label_filename out"
            )


def check_tensors(config: ModelConfig) -> None:
    try:
        for tensor in config.input:
            _check_tensor(tensor, "input", config)
            if tensor.format and len(tensor.dims) != 3:
                raise DamagedInput("model input NHWC/NCHW require 3 dims")
            if tensor.allow_ragged_batch:
                raise UnsupportedInput(f"model input '{tensor.name}' is ragged, which this runner lacks")
        for tensor in config.output:
            _check_tensor(tensor, "output", config)
    except DamagedInput as error:
        raise DamagedInput(f"{error} for {config.name}") from None


def notes(config: ModelConfig) -> tuple[str, ...]:
    """What the config asks for and this runner accepts without doing it."""
    said = tuple(f"{field}: {meaning}" for field, (meaning, is_asked) in NOT_EXERCISED.items() if is_asked(config))
    if EXECUTED_BY in config.parameters:
        return (*said, f"executed by {config.parameters[EXECUTED_BY].string_value}")
    return said


def _check_backend(config: ModelConfig) -> None:
    name, platform, backend = config.name, config.platform, config.backend
    if platform == "ensemble":
        if backend:
            raise DamagedInput(f"Ensemble model '{name}' must have platform type 'ensemble' and empty backend type")
        if not config.HasField("ensemble_scheduling"):
            raise DamagedInput(f"ensemble scheduling must be set for ensemble {name} whose platform is ensemble")
        check_wiring(config)
        return
    if config.HasField("ensemble_scheduling"):
        raise DamagedInput(f"ensemble scheduling cannot be set for model '{name}' whose platform is not ensemble")
    if not backend and platform:
        raise DamagedInput(f"unexpected platform type '{platform}' for {name}")
    if not backend:
        raise DamagedInput(
            f"Invalid model name: Could not determine backend for model '{name}' with no backend in model "
            "configuration. Expected model name of the form 'model.<backend_name>'."
        )
    if any(kind.backend == backend for kind in KINDS) and platform not in (platforms(backend) or ("",)):
        raise DamagedInput(f"unexpected 'platform' and 'backend' pair, got:{platform}, {backend}")


def _check_queue(config: ModelConfig) -> None:
    batching, name = config.dynamic_batching, config.name
    levels, policies = batching.priority_levels, batching.priority_queue_policy
    if levels and not 0 < batching.default_priority_level <= levels:
        raise DamagedInput(f"default priority level must be in range [1, {levels}] for {name}")
    if levels and any(not 0 < level <= levels for level in policies):
        raise DamagedInput(f"priority queue policy must have priority level in range [1, {levels}] for {name}")
    if not batching.preserve_ordering:
        return
    if levels > 1:
        raise DamagedInput(f"Only one priority level is allowed when 'preserve_ordering' is true for {name}")
    for policy in (batching.default_queue_policy, *policies.values()):
        if policy.default_timeout_microseconds and policy.timeout_action == policy.DELAY:
            raise DamagedInput(
                f"Queue policy can not have DELAY as timeout action when 'preserve_ordering' is true for {name}"
            )


def _check_tensor(tensor: Any, kind: str, config: ModelConfig) -> None:
    if not tensor.name:
        raise DamagedInput(f"model {kind} must specify 'name'")
    who = f"model {kind} '{tensor.name}'"
    if not tensor.data_type:
        raise DamagedInput(f"{who} must specify 'data_type'")
    if not tensor.dims:
        raise DamagedInput(f"{who} must specify 'dims'")
    if any(dim < 1 and dim != -1 for dim in tensor.dims):
        raise DamagedInput(f"{who} dimension must be integer >= 1, or -1 to indicate a variable-size dimension")
    if tensor.is_shape_tensor:
        raise DamagedInput("shape tensors are only supported for TensorRT platform")
    if tensor.HasField("reshape"):
        _check_reshape(who, tensor.dims, tensor.reshape.shape, config.max_batch_size)


def _check_reshape(who: str, dims: Sequence[int], reshape: Sequence[int], max_batch_size: int) -> None:
    if not reshape and max_batch_size == 0:
        raise DamagedInput(
            f"{who} cannot have empty reshape for non-batching model as scalar tensors are not supported"
        )
    if any(dim < 1 and dim != -1 for dim in reshape):
        raise DamagedInput(
            f"{who} reshape dimensions must be integer >= 1, or -1 to indicate a variable-size dimension"
        )
    before, after = _chunks(dims), _chunks(reshape)
    if len(before) != len(after):
        raise DamagedInput(f"{who} has different number of variable-size dimensions for dims and reshape")
    if before != after:
        raise DamagedInput(f"{who} has different size for dims and reshape")


def _chunks(shape: Sequence[int]) -> list[int]:
    """Elements between the variable dimensions: [2, 4, -1, 6] is [8, 6], as is [8, -1, 6]."""
    cuts = [at for at, dim in enumerate(shape) if dim == -1]
    starts, ends = [0, *(cut + 1 for cut in cuts)], [*cuts, len(shape)]
    return [math.prod(shape[start:end]) for start, end in zip(starts, ends, strict=True)]
