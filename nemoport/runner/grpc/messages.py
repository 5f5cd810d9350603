"""Protobuf messages of the protocol to the values of the runner, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import numpy as np
from tritonclient.grpc import service_pb2 as pb

from nemoport.runner.datatypes import BY_NAME, BYTES
from nemoport.runner.refusal import Refusal
from nemoport.runner.request import (
    InferRequest,
    InferResponse,
    InputTensor,
    Parameter,
    check_parameters,
    check_supported,
)
from nemoport.runner.tensors import MOST_DIMS, Array, Buffer, show, to_raw

_CONTENTS = {  # the field of InferTensorContents that carries a datatype; the 16-bit floats have none
    "BOOL": "bool_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
_LONGEST_STATUS = 4000  # bytes; clients limit the size of headers
_PRINTABLE = "".join(chr(code) for code in range(32, 127) if chr(code) != "%")
_OWN = ("triton_enable_empty_final_response",)
_WRONG_KIND = "invalid value type for '{}' parameter, expected int64_param, bool_param, or string_param."


def request_from(message: Any) -> InferRequest:
    inputs, raw = [], list(message.raw_input_contents)
    if len(raw) > len(message.inputs):
        raise Refusal(
            f"expected {len(message.inputs)} inputs but got {len(raw)} raw input contents "
            f"for model '{message.model_name}'"
        )
    for at, tensor in enumerate(message.inputs):
        check_supported(tensor.parameters)
        if raw and tensor.HasField("contents"):
            raise Refusal(
                f"contents field must not be specified when using raw_input_contents for '{tensor.name}' "
                f"for model '{message.model_name}'"
            )
        if tensor.datatype not in BY_NAME:
            raise Refusal(f"invalid datatype for input {tensor.name}")
        shape = _shape(tensor, message)
        if at >= len(raw) and not tensor.HasField("contents"):
            raise Refusal(
                f"unable to find data for input tensor '{tensor.name}' for model '{message.model_name}' in request."
            )
        data: Array | Buffer = raw[at] if raw else _contents(tensor, shape, message)
        inputs.append(InputTensor(tensor.name, BY_NAME[tensor.datatype], shape, data))
    names = []
    for output in message.outputs:
        check_supported(output.parameters)
        names.append(output.name)
    parameters = parameters_from(message.parameters)
    check_parameters(parameters, _OWN, _WRONG_KIND)
    return InferRequest(tuple(inputs), tuple(names), message.id, parameters)


def parameters_from(entries: Mapping[str, Any]) -> dict[str, Any]:
    """None stands for one of no kind."""
    return {
        name: getattr(value, kind) if (kind := value.WhichOneof("parameter_choice")) else None
        for name, value in entries.items()
    }


def message_of(response: InferResponse) -> Any:
    message = pb.ModelInferResponse(
        model_name=response.model_name, model_version=str(response.model_version), id=response.id
    )
    for name, value in response.parameters.items():
        set_parameter(message.parameters[name], value)
    for tensor in response.outputs:
        message.outputs.add(name=tensor.name, datatype=tensor.datatype.name, shape=tensor.array.shape)
        message.raw_output_contents.append(bytes(to_raw(tensor.datatype, tensor.array)))
    return message


def set_parameter(entry: Any, value: Parameter) -> None:
    kinds = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}
    setattr(entry, kinds[type(value)], value)


def version_from(text: str) -> int | None:
    if not text:
        return None
    if not (text.isascii() and text.isdecimal()) or len(text) > 18:
        raise Refusal(
            f"failed to get model version from specified version string '{text[:40]}' (details: stol), "
            "version should be an integral value > 0"
        )
    return int(text)


def shortened(error: Exception) -> str:
    """What fits into a status: it travels in a header, where a byte that is not printable ASCII takes three."""
    text = str(error)[:_LONGEST_STATUS].encode(errors="replace").decode()
    while (length := len(quote(text, safe=_PRINTABLE))) > _LONGEST_STATUS:
        text = text[: min(len(text) * _LONGEST_STATUS // length, len(text) - 1)]
    return text


def _shape(tensor: Any, message: Any) -> tuple[int, ...]:
    dims = tuple(tensor.shape)
    if min(dims, default=0) < 0:
        raise Refusal(
            f"[request id: {message.id or '<id_unknown>'}] All input dimensions should be specified for input "
            f"'{tensor.name}' for model '{message.model_name}', got {show(dims)}"
        )
    if len(dims) > MOST_DIMS:
        raise Refusal(
            f"invalid shape for input '{tensor.name}': {len(dims)} dimensions, at most {MOST_DIMS} are supported"
        )
    if math.prod(dims) >= 2**63:
        raise Refusal(f"invalid shape for input '{tensor.name}': shape {show(dims)} has too many elements")
    return dims


def _contents(tensor: Any, shape: tuple[int, ...], message: Any) -> Array:
    datatype, model = BY_NAME[tensor.datatype], message.model_name
    field = _CONTENTS.get(datatype.name)
    for found in (each.name for each, _ in tensor.contents.ListFields()):
        if found != field:
            kinds = [name for name, other in _CONTENTS.items() if other == found]
            raise Refusal(
                f"unexpected explicit tensor data for input tensor '{tensor.name}' for model '{model}' of type "
                f"'{kinds[-1]}', expected datatype '{datatype.name}'"
            )
    if field is None:
        raise Refusal(f"{datatype.name} data of input '{tensor.name}' must be sent in raw_input_contents")
    elements = list(getattr(tensor.contents, field))
    if len(elements) != math.prod(shape):
        size = datatype.numpy.itemsize
        raise Refusal(
            f"[request id: {message.id or '<id_unknown>'}] input byte size mismatch for input '{tensor.name}' for "
            f"model '{model}'. Expected {math.prod(shape) * size}, got {len(elements) * size}"
        )
    if datatype is BYTES:
        array = np.empty(len(elements), np.object_)
        array[:] = elements
        return array
    try:
        return np.array(elements, datatype.numpy)
    except OverflowError:
        raise Refusal(f"input '{tensor.name}' is {datatype.name}, and a number in it is out of its range") from None
