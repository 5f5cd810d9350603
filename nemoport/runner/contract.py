"""What a request to a model must look like, and the check that says so in Triton's words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nemoport.runner.datatypes import BYTES, Datatype
from nemoport.runner.refusal import Refusal
from nemoport.runner.request import InferRequest, InputTensor
from nemoport.runner.tensors import Array, Buffer, from_raw, show, split_bytes

_UNNAMED = InferRequest(()).label
_BATCH_NOTE = (
    "NOTE: Setting a non-zero max_batch_size in the model config requires a batch dimension to be prepended to each "
    "input shape. If you want to specify the full shape including the batch dim in your input dims config, try setting "
    "max_batch_size to zero. See the model configuration docs for more info on max_batch_size."
)


@dataclass(frozen=True, slots=True)
class TensorContract:
    """`dims` are what a client sees, without the batch; `reshape` is what the model sees, where that differs."""

    name: str
    datatype: Datatype
    dims: tuple[int, ...]
    reshape: tuple[int, ...] | None = None
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Contract:
    model: str
    max_batch_size: int
    inputs: Mapping[str, TensorContract]
    outputs: Mapping[str, TensorContract]

    def client_shape(self, tensor: TensorContract) -> tuple[int, ...]:
        return (-1, *tensor.dims) if self.max_batch_size else tensor.dims


def accept(request: InferRequest, contract: Contract) -> dict[str, Array]:
    """The arrays to run the model on, in the model's shapes; refuses, in Triton's order, what does not fit."""
    _check_distinct("output", request.outputs, request)
    _check_distinct("input", [tensor.name for tensor in request.inputs], request)
    for name in request.outputs:
        if name not in contract.outputs:
            raise Refusal(f"unexpected inference output '{name}' for model '{contract.model}'")
    _check_count(request, contract)
    for tensor in request.inputs:
        if tensor.name not in contract.inputs:
            raise Refusal(f"unexpected inference input '{tensor.name}' for model '{contract.model}'")
    try:
        if contract.max_batch_size:
            _check_batch(request.inputs, contract)
        return {tensor.name: _array(tensor, contract.inputs[tensor.name], contract) for tensor in request.inputs}
    except Refusal as refusal:
        raise Refusal(f"{request.label}{refusal}") from None


def answer(array: Array, tensor: TensorContract, contract: Contract) -> Array:
    """The model's output in the shape that a client is promised."""
    if tensor.reshape is None:
        return array
    if contract.max_batch_size:
        return array.reshape(array.shape[0], *_reshaped(array.shape[1:], tensor.reshape, tensor.dims))
    return array.reshape(_reshaped(array.shape, tensor.reshape, tensor.dims))


def raw_input(buffer: Buffer, contract: Contract) -> InputTensor:
    """The only input of a model from a body without JSON: the batch is 1, at most one dimension is deduced."""
    if len(contract.inputs) != 1:
        raise Refusal(
            f"{_UNNAMED}Raw request must only have 1 input (found 1) to be deduced but got "
            f"{len(contract.inputs)} inputs in '{contract.model}' model configuration"
        )
    (tensor,) = contract.inputs.values()
    shape = [1, *tensor.dims] if contract.max_batch_size else list(tensor.dims)
    if tensor.datatype is BYTES:
        if any(dim != 1 for dim in tensor.dims):
            raise Refusal(f"{_UNNAMED}For BYTE datatype raw input '{tensor.name}', the model must have input shape [1]")
        content = np.empty(1, np.object_)
        content[0] = bytes(buffer)
        return InputTensor(tensor.name, tensor.datatype, tuple(shape), content)
    if shape.count(-1) > 1:
        raise Refusal(
            f"{_UNNAMED}The shape of the raw input '{tensor.name}' can not be deduced because there are more than one "
            "variable-sized dimension"
        )
    if -1 in shape:
        known = math.prod(dim for dim in shape if dim != -1) * tensor.datatype.numpy.itemsize
        shape[shape.index(-1)] = len(buffer) // known
    return InputTensor(tensor.name, tensor.datatype, tuple(shape), buffer)


def _check_distinct(kind: str, names: Sequence[str], request: InferRequest) -> None:
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise Refusal(f"{request.label}{kind} '{twice}' already exists in request")


def _check_count(request: InferRequest, contract: Contract) -> None:
    if len(request.inputs) == len(contract.inputs):
        return
    required = [name for name, tensor in contract.inputs.items() if not tensor.optional]
    if len(required) <= len(request.inputs) < len(contract.inputs):
        return
    given = [tensor.name for tensor in request.inputs]
    total = len(contract.inputs)
    expected = f"{total} inputs" if len(required) == total else f"number of inputs between {len(required)} and {total}"
    raise Refusal(
        f"{request.label}expected {expected} but got {len(given)} inputs for model '{contract.model}'. "
        f"Got input(s) {_quoted(given)}, but missing required input(s) "
        f"{_quoted(name for name in required if name not in given)}. Please provide all required input(s)."
    )


def _check_batch(inputs: Iterable[InputTensor], contract: Contract) -> None:
    batch = -1
    for tensor in inputs:
        if not tensor.shape:
            raise Refusal(
                f"input '{tensor.name}' has no shape but model requires batch dimension for '{contract.model}'"
            )
        if batch == -1:
            batch = tensor.shape[0]
        elif tensor.shape[0] != batch:
            raise Refusal(f"input '{tensor.name}' batch size does not match other inputs for '{contract.model}'")
    if batch > contract.max_batch_size:
        raise Refusal(f"inference request batch-size must be <= {contract.max_batch_size} for '{contract.model}'")
    if batch == 0:
        raise Refusal(f"inference request batch-size must be >= 1 for '{contract.model}'")


def _array(tensor: InputTensor, expected: TensorContract, contract: Contract) -> Array:
    name, model, shape = tensor.name, contract.model, tensor.shape
    if tensor.datatype is not expected.datatype:
        raise Refusal(
            f"inference input '{name}' data-type is '{tensor.datatype.name}', "
            f"but model '{model}' expects '{expected.datatype.name}'"
        )
    batch = shape[:1] if contract.max_batch_size else ()
    dims = shape[len(batch) :]
    if not _fits(dims, expected.dims):
        raise Refusal(
            f"unexpected shape for input '{name}' for model '{model}'. "
            f"Expected {show(contract.client_shape(expected))}, got {show(shape)}. {_BATCH_NOTE if batch else ''}"
        )
    if expected.reshape is not None:
        shape = batch + _reshaped(dims, expected.dims, expected.reshape)
    flat = _decode(tensor, math.prod(shape), model)
    try:
        return flat.reshape(shape)
    except ValueError:  # no elements, and other dimensions beyond what numpy can count
        raise Refusal(f"invalid shape for input '{name}': {show(shape)} exceeds maximum size") from None


def _decode(tensor: InputTensor, count: int, model: str) -> Array:
    data, itemsize = tensor.data, tensor.datatype.numpy.itemsize
    if isinstance(data, np.ndarray):
        _check_size(tensor, count * itemsize, data.nbytes, model)
        return data
    if tensor.datatype is BYTES:
        return split_bytes(data, count, f"inference input '{tensor.name}' for model '{model}'")
    _check_size(tensor, count * itemsize, len(data), model)
    return from_raw(tensor.datatype, data)


def _check_size(tensor: InputTensor, needed: int, found: int, model: str) -> None:
    if found != needed:
        raise Refusal(
            f"input byte size mismatch for input '{tensor.name}' for model '{model}'. Expected {needed}, got {found}"
        )


def _fits(dims: Sequence[int], expected: Sequence[int]) -> bool:
    if dims == expected:
        return True
    return len(dims) == len(expected) and all(want in (-1, dim) for dim, want in zip(dims, expected, strict=True))


def _reshaped(shape: Sequence[int], source: Sequence[int], target: Sequence[int]) -> tuple[int, ...]:
    """`target` with its -1 replaced, in order, by what `shape` has where `source` has -1."""
    variable = iter([dim for dim, pattern in zip(shape, source, strict=True) if pattern == -1])
    return tuple(next(variable) if dim == -1 else dim for dim in target)


def _quoted(names: Iterable[str]) -> str:
    return "[" + ",".join(f"'{name}'" for name in names) + "]"
