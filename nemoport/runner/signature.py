"""The tensors a model file has, and whether a config agrees with them, in the words of Triton's ONNX backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemoport.errors import DamagedInput
from nemoport.runner.datatypes import BY_CONFIG, Datatype
from nemoport.runner.model_config import ModelConfig, data_type, normalised
from nemoport.runner.tensors import show

DEFAULT_MAX_BATCH_SIZE = 4  # what Triton gives a model that can batch and does not say how far


@dataclass(frozen=True)
class TensorSignature:
    """-1 in the shape is a symbolic dimension, () is a scalar."""

    name: str
    datatype: Datatype
    shape: tuple[int, ...]


Signature = Mapping[str, TensorSignature]


def completed(config: ModelConfig, inputs: Signature, outputs: Signature) -> ModelConfig:
    """The config with the inputs, outputs and batching that it leaves out taken from the model."""
    if config.input and config.output:
        return config
    done = ModelConfig()
    done.CopyFrom(config)
    if all(tensor.shape[:1] == (-1,) for tensor in (*inputs.values(), *outputs.values())):
        done.max_batch_size = done.max_batch_size or DEFAULT_MAX_BATCH_SIZE
        if done.max_batch_size > 1 and done.WhichOneof("scheduling_choice") is None:
            done.dynamic_batching.SetInParent()
    elif done.max_batch_size:
        raise DamagedInput(
            f"autofill failed for model '{config.name}': model does not support batching "
            "while non-zero max_batch_size is specified"
        )
    if not done.input:
        _fill(done.input, inputs, done.max_batch_size)
    if not done.output:
        _fill(done.output, outputs, done.max_batch_size)
    return normalised(done)


def check_agreement(config: ModelConfig, inputs: Signature, outputs: Signature) -> None:
    """Every model input is configured, outputs may be a subset; names, datatypes and dims agree."""
    name = config.name
    if len(config.input) != len(inputs):
        raise DamagedInput(
            f"unable to load model '{name}', configuration expects {len(config.input)} inputs, "
            f"model provides {len(inputs)}"
        )
    for tensor in config.input:
        _check_tensor(config, tensor, "input", inputs)
        if tensor.optional and config.max_batch_size:
            raise DamagedInput(
                f"unable to load model '{name}', optional input '{tensor.name}' is not supported "
                "for models that support batching"
            )
    for tensor in config.output:
        _check_tensor(config, tensor, "output", outputs)


def _check_tensor(config: ModelConfig, tensor: Any, kind: str, signature: Signature) -> None:
    found = signature.get(tensor.name)
    if found is None:
        raise DamagedInput(
            f"unexpected inference {kind} '{tensor.name}', allowed {kind}s are: {', '.join(sorted(signature))}"
        )
    datatype = data_type(tensor)
    if found.datatype is not BY_CONFIG.get(datatype):
        raise DamagedInput(
            f"unable to load model '{config.name}', configuration expects datatype {datatype} for {kind} "
            f"'{tensor.name}', model provides {found.datatype.config}"
        )
    dims = tuple(tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims)
    if found.shape:
        _check_dims(config, tensor.name, found.shape, dims, may_narrow=kind == "input")
    elif any(dim != 1 for dim in dims):
        raise DamagedInput(
            f"unable to load model '{config.name}', scalar tensor '{tensor.name}', should only provide 1 in the model "
            f"configuration when the model doesn't support batching. Model configuration provided: {show(dims)}."
        )


def _check_dims(
    config: ModelConfig, tensor: str, shape: Sequence[int], dims: Sequence[int], *, may_narrow: bool
) -> None:
    """A number may stand over a symbolic dimension of an input; an output must repeat the model's shape exactly."""
    batching = config.max_batch_size > 0
    if batching and shape[0] != -1:
        raise DamagedInput(
            f"model '{config.name}', tensor '{tensor}': for the model to support batching the shape should have at "
            "least 1 dimension and the first dimension must be -1; but shape expected by the model is "
            f"{show(shape)}"
        )
    full = (-1, *dims) if batching else tuple(dims)
    if len(full) == len(shape) and all(
        have == want or (may_narrow and have == -1) for have, want in zip(shape, full, strict=True)
    ):
        return
    specified = (
        f"(an initial batch dimension because max_batch_size > 0 followed by the explicit tensor shape, "
        f"making complete shape {show(full)})"
        if batching
        else f"(shape {show(full)})"
    )
    raise DamagedInput(
        f"model '{config.name}', tensor '{tensor}': the model expects {len(shape)} dimensions (shape {show(shape)}) "
        f"but the model configuration specifies {len(full)} dimensions {specified}"
    )


def _fill(tensors: Any, signature: Signature, max_batch_size: int) -> None:
    for found in signature.values():
        tensor = tensors.add(name=found.name, data_type=found.datatype.config)
        dims = found.shape[1:] if max_batch_size else found.shape
        tensor.dims.extend(dims or (1,))
        if not dims and max_batch_size:
            tensor.reshape.SetInParent()
