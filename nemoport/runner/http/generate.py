"""The generate extension: a flat JSON object in, a flat JSON object out, one or a stream of them.

{"text_input": "hello", "max_tokens": 3}  ->  {"model_name": "m", "model_version": "1", "text_output": "..."}
"""

from __future__ import annotations

import math
from typing import Any

from nemoport.runner.contract import Contract, TensorContract
from nemoport.runner.http.exchange import as_json
from nemoport.runner.http.head import parse_json
from nemoport.runner.refusal import Refusal
from nemoport.runner.request import InferRequest, InferResponse, InputTensor, Parameter, Response
from nemoport.runner.tensors import Buffer, from_json, to_json

_SCALARS = (bool, int, float, str)


def request_of(body: Buffer, contract: Contract) -> InferRequest:
    """Members that are named as inputs are inputs, `id` and `parameters` are themselves, others are parameters."""
    inputs: list[InputTensor] = []
    said, parameters = "", dict[str, Parameter]()
    for name, value in parse_json(body).items():
        if name in contract.inputs:
            inputs.append(_input(contract.inputs[name], value, contract))
        elif name == "id" and isinstance(value, str):
            said = value
        elif name == "parameters":
            parameters |= _parameters(value)
        else:
            parameters |= _parameters({name: value})
    return InferRequest(tuple(inputs), (), said, parameters)


def members(response: InferResponse) -> dict[str, Any]:
    """Triton sorts them; an output of one element is that element."""
    found: dict[str, Any] = {"model_name": response.model_name, "model_version": str(response.model_version)}
    if response.id:
        found["id"] = response.id
    for tensor in response.outputs:
        elements = to_json(tensor.datatype, tensor.array, tensor.name)
        found[tensor.name] = elements[0] if len(elements) == 1 else elements
    return dict(sorted(found.items()))


def event(response: Response) -> bytes:
    """One event of a stream; nothing for an end that says nothing."""
    if response.content is None:
        return b""
    try:
        content = members(response.value())
    except Refusal as refusal:
        content = {"error": str(refusal)}
    return b"data: " + as_json(content) + b"\n\n"


def _input(tensor: TensorContract, value: Any, contract: Contract) -> InputTensor:
    """A value, or a list of as many as the one variable dimension is to have."""
    data = value if isinstance(value, list) else [value]
    shape = list(contract.client_shape(tensor))
    if contract.max_batch_size:
        shape[0] = 1
    count = _count(data)
    if shape.count(-1) > 1:
        raise Refusal(f"input '{tensor.name}' has more than one variable dimension, which generate cannot deduce")
    if -1 in shape:
        shape[shape.index(-1)] = count // math.prod(dim for dim in shape if dim != -1)
    return InputTensor(tensor.name, tensor.datatype, tuple(shape), from_json(tensor.datatype, data, shape, tensor.name))


def _count(data: list[Any]) -> int:
    """Elements of lists in lists, to the depth that `from_json` takes."""
    waiting, count = list(data), 0
    while waiting:
        each = waiting.pop()
        if isinstance(each, list):
            waiting.extend(each)
        else:
            count += 1
    return count


def _parameters(value: Any) -> dict[str, Parameter]:
    if not isinstance(value, dict):
        raise Refusal("Unable to parse 'parameters': attempt to access JSON non-object as object")
    for name, each in value.items():
        if type(each) not in _SCALARS:
            raise Refusal(f"parameter '{name[:100]}' has invalid type. It should be either 'int', 'bool', or 'string'.")
    return dict(value)
