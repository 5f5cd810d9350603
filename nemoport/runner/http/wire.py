"""The body of an inference request and of its answer: JSON, and after it the tails of binary tensors.

    {"inputs": [{"name": "A", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": 8}}]}<8 bytes>

The header Inference-Header-Content-Length says where the JSON ends. Inputs are views into the body, not copies.
"""

from __future__ import annotations

from functools import lru_cache

from nemoport.runner.http.exchange import as_json
from nemoport.runner.http.head import Entry, Form, read_head, remembered_head
from nemoport.runner.refusal import Refusal
from nemoport.runner.request import InferRequest, InferResponse, InputTensor
from nemoport.runner.tensors import Buffer, from_json, to_json, to_raw

RAW_FORM = Form(all_binary=True)
_SHORT = 1024  # bytes of JSON which is the same in each request of a client, where the tensors are behind it
_SHAPES = 1024  # of answers, whose JSON is kept


def parse_request(body: Buffer, header_length: int, model: str) -> tuple[InferRequest, Form]:
    view = memoryview(body)
    text, tail = view[:header_length], view[header_length:]
    head = remembered_head(bytes(text)) if tail and header_length <= _SHORT else read_head(text)
    inputs = []
    for entry in head.inputs:
        inputs.append(_input(entry, tail, model))
        tail = tail[entry.size :]
    if tail:
        raise Refusal(f"unexpected additional input data for model '{model}'")
    return InferRequest(tuple(inputs), head.outputs, head.id, head.parameters), head.form


def format_response(response: InferResponse, form: Form) -> tuple[bytes, int | None]:
    """The body, and the length of its JSON when binary tensors follow it."""
    outputs, tails = [], []
    for tensor in response.outputs:
        about = (tensor.name, tensor.datatype.name, tensor.array.shape)
        if form.is_binary(tensor.name):
            tail = to_raw(tensor.datatype, tensor.array)
            tails += [tail] if tail else []  # nothing to follow is plain JSON, as on Triton
            outputs.append(_binary(*about, len(tail)))
        else:
            outputs.append(_written(*about, "data", to_json(tensor.datatype, tensor.array, tensor.name)))
    members = [_named(response.model_name, response.model_version)]
    if response.id:
        members.insert(0, b'"id":' + as_json(response.id))
    if response.parameters:
        members.append(b'"parameters":' + as_json(dict(response.parameters)))
    head = b'{%s,"outputs":[%s]}' % (b",".join(members), b",".join(outputs))
    return (b"".join((head, *tails)), len(head)) if tails else (head, None)


def _input(entry: Entry, tail: memoryview, model: str) -> InputTensor:
    if entry.data is not None:
        array = from_json(entry.datatype, entry.data, entry.shape, entry.name)
        return InputTensor(entry.name, entry.datatype, entry.shape, array)
    if entry.size > len(tail):
        missing = entry.size - len(tail)
        raise Refusal(
            f"unexpected size for input '{entry.name}', expecting {missing} additional bytes for model '{model}'"
        )
    return InputTensor(entry.name, entry.datatype, entry.shape, tail[: entry.size])


@lru_cache(_SHAPES)
def _binary(name: str, datatype: str, shape: tuple[int, ...], size: int) -> bytes:
    return _written(name, datatype, shape, "parameters", {"binary_data_size": size})


def _written(name: str, datatype: str, shape: tuple[int, ...], member: str, value: object) -> bytes:
    return as_json({"name": name, "datatype": datatype, "shape": shape, member: value})


@lru_cache(_SHAPES)
def _named(model: str, version: int) -> bytes:
    return as_json({"model_name": model, "model_version": str(version)})[1:-1]
