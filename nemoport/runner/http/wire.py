"""The body of an inference request and of its answer: JSON, and after it the tails of binary tensors.

    {"inputs": [{"name": "A", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": 8}}]}<8 bytes>

The header Inference-Header-Content-Length says where the JSON ends. Inputs are views into the body, not copies.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemoport.runner.datatypes import BY_NAME
from nemoport.runner.http.exchange import as_json
from nemoport.runner.refusal import Refusal
from nemoport.runner.request import InferRequest, InferResponse, InputTensor
from nemoport.runner.tensors import MOST_DIMS, Buffer, from_json, show, to_json, to_raw

_LARGEST_DIM = 2**63 - 1
_MISSING: Any = object()
_KINDS = {dict: "object", list: "array", str: "string", bool: "boolean"}
_NOT_UNSIGNED = "attempt to access JSON non-unsigned-integer as unsigned-integer"
_UNSUPPORTED = {  # parameters of tensors that mean something this runner does not do
    "shared_memory_region": "shared memory is not supported by this server, send the tensor in the request",
    "classification": "classification is not supported by this server, ask for the whole output",
}


@dataclass(frozen=True, slots=True)
class Form:
    """How a client wants its outputs: those it named, and all when it named none."""

    binary: frozenset[str] = frozenset()
    all_binary: bool = False

    def is_binary(self, name: str) -> bool:
        return self.all_binary or name in self.binary


RAW_FORM = Form(all_binary=True)


def parse_json(text: Buffer) -> dict[str, Any]:
    """An object; an empty body is an empty one."""
    if not text:
        return {}
    try:
        value = json.loads(str(text, "utf-8"))
    except (ValueError, RecursionError) as error:
        raise Refusal(f"failed to parse the request JSON buffer: {error}") from None
    fields: dict[str, Any] = _is(value, dict, "the request")
    return fields


def parse_request(body: Buffer, header_length: int, model: str) -> tuple[InferRequest, Form]:
    view = memoryview(body)
    fields = parse_json(view[:header_length])
    tail = view[header_length:]
    inputs = []
    for entry in _member(fields, "inputs", list):
        tensor, size = _input(_is(entry, dict, "an input"), tail, model)
        tail = tail[size:]
        inputs.append(tensor)
    if tail:
        raise Refusal(f"unexpected additional input data for model '{model}'")
    outputs = [_is(entry, dict, "an output") for entry in _member(fields, "outputs", list, [])]
    names = tuple(_member(entry, "name", str) for entry in outputs)
    parameters = _parameters(fields)
    request = InferRequest(tuple(inputs), names, _member(fields, "id", str, ""), parameters)
    if names:  # Triton reads binary_data_output only when no output is named
        binary = frozenset(name for name, entry in zip(names, outputs, strict=True) if _wants_binary(entry))
        return request, Form(binary)
    return request, Form(all_binary=_member(parameters, "binary_data_output", bool, False))


def format_response(response: InferResponse, form: Form) -> tuple[bytes, int | None]:
    """The body, and the length of its JSON when binary tensors follow it."""
    outputs, tails = [], []
    for tensor in response.outputs:
        entry: dict[str, Any] = {
            "name": tensor.name,
            "datatype": tensor.datatype.name,
            "shape": tensor.array.shape,
        }
        if form.is_binary(tensor.name):
            tail = to_raw(tensor.datatype, tensor.array)
            entry["parameters"] = {"binary_data_size": len(tail)}
            tails += [tail] if tail else []  # nothing to follow is plain JSON, as on Triton
        else:
            entry["data"] = to_json(tensor.datatype, tensor.array, tensor.name)
        outputs.append(entry)
    fields: dict[str, Any] = {"model_name": response.model_name, "model_version": str(response.model_version)}
    if response.parameters:
        fields["parameters"] = dict(response.parameters)
    fields["outputs"] = outputs
    if response.id:
        fields = {"id": response.id, **fields}
    head = as_json(fields)
    return (b"".join((head, *tails)), len(head)) if tails else (head, None)


def _input(entry: Mapping[str, Any], tail: memoryview, model: str) -> tuple[InputTensor, int]:
    """An input, and how many bytes of the tail are its."""
    parameters = _parameters(entry)
    _check_source("data" in entry, parameters)
    name = _member(entry, "name", str)
    said = _member(entry, "datatype", str)
    if said not in BY_NAME:
        raise Refusal(f"invalid datatype for input {name}")
    datatype, shape = BY_NAME[said], _shape(entry, name)
    if "data" in entry:
        return InputTensor(name, datatype, shape, from_json(datatype, entry["data"], shape, name)), 0
    size = parameters["binary_data_size"]
    if type(size) is not int or size < 0:
        raise Refusal(f"Unable to parse 'binary_data_size': {_NOT_UNSIGNED}")
    if size > len(tail):
        raise Refusal(
            f"unexpected size for input '{name}', expecting {size - len(tail)} additional bytes for model '{model}'"
        )
    return InputTensor(name, datatype, shape, tail[:size]), size


def _check_source(has_data: bool, parameters: Mapping[str, Any]) -> None:
    given = [f"'{name}'" for name in ("binary_data_size", "shared_memory_region") if name in parameters]
    given = ["'data'", *given] if has_data else given
    if len(given) != 1:
        raise Refusal(
            "Input must set only one of the following fields: 'data', 'binary_data_size' in 'parameters', "
            f"'shared_memory_region' in 'parameters'. But {'set ' + ' '.join(given) if given else 'no field is set'}"
        )
    _check_supported(parameters)


def _shape(entry: Mapping[str, Any], name: str) -> tuple[int, ...]:
    dims = _member(entry, "shape", list)
    if any(type(dim) is not int or not 0 <= dim <= _LARGEST_DIM for dim in dims):
        raise Refusal(f"Unable to parse 'shape': {_NOT_UNSIGNED}")
    if len(dims) > MOST_DIMS:
        raise Refusal(f"invalid shape for input '{name}': {len(dims)} dimensions, at most {MOST_DIMS} are supported")
    if math.prod(dims) > _LARGEST_DIM:
        raise Refusal(
            f"invalid shape for input '{name}': shape {show(dims)} causes total element count to exceed "
            f"maximum size of {_LARGEST_DIM}"
        )
    return tuple(dims)


def _wants_binary(entry: Mapping[str, Any]) -> bool:
    parameters = _parameters(entry)
    _check_supported(parameters)
    return bool(_member(parameters, "binary_data", bool, False))


def _check_supported(parameters: Mapping[str, Any]) -> None:
    for name in parameters:
        if name in _UNSUPPORTED:
            raise Refusal(_UNSUPPORTED[name])


def _parameters(fields: Mapping[str, Any]) -> dict[str, Any]:
    parameters: dict[str, Any] = _member(fields, "parameters", dict, {})
    return parameters


def _member(fields: Mapping[str, Any], name: str, kind: type, default: Any = _MISSING) -> Any:
    value = fields.get(name, default)
    if value is _MISSING:
        raise Refusal(f"Unable to parse '{name}': attempt to access non-existing object member '{name}'")
    return _is(value, kind, f"'{name}'")


def _is(value: Any, kind: type, what: str) -> Any:
    if not isinstance(value, kind):
        raise Refusal(f"Unable to parse {what}: attempt to access JSON non-{_KINDS[kind]} as {_KINDS[kind]}")
    return value
