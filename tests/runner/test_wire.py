"""The JSON of requests and answers, whether it is read and written anew or remembered."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from nemoport.runner.datatypes import BY_NUMPY
from nemoport.runner.http.head import Form
from nemoport.runner.http.wire import format_response, parse_request
from nemoport.runner.refusal import Refusal
from nemoport.runner.request import InferResponse, OutputTensor

BINARY = {"name": "A", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": 8}}
IN_JSON = {"name": "B", "datatype": "INT32", "shape": [2], "data": [1, 2]}
SHORT, LONG = 0, 5000
"""Spaces behind the JSON: what is long is not remembered."""


def read(fields: Any, tail: bytes = b"", spaces: int = SHORT) -> Any:
    text = json.dumps(fields).encode() + b" " * spaces
    return parse_request(text + tail, len(text), "m")


@pytest.mark.parametrize("spaces", [SHORT, LONG])
def test_requests_of_one_json_have_tensors_of_their_own(spaces: int) -> None:
    fields = {"inputs": [BINARY, IN_JSON], "id": "7", "outputs": [{"name": "Y"}], "parameters": {"priority": 2}}
    for value in (1.0, 2.0):
        request, form = read(fields, np.full(2, value, np.float32).tobytes(), spaces)
        raw, array = (tensor.data for tensor in request.inputs)
        assert np.frombuffer(raw, np.float32).tolist() == [value, value]
        assert array.tolist() == [1, 2]
        array[:] = 9  # as a model may that computes in place
        assert (request.id, request.outputs, dict(request.parameters)) == ("7", ("Y",), {"priority": 2})
        assert not form.is_binary("Y")


@pytest.mark.parametrize("spaces", [SHORT, LONG])
def test_what_is_wrong_is_refused_again(spaces: int) -> None:
    for _ in range(2):
        with pytest.raises(Refusal, match="invalid datatype for input A"):
            read({"inputs": [{**BINARY, "datatype": "X"}]}, bytes(8), spaces)
        with pytest.raises(Refusal, match="expecting 1 additional bytes for model 'm'"):
            read({"inputs": [BINARY]}, bytes(7), spaces)
        with pytest.raises(Refusal, match="unexpected additional input data for model 'm'"):
            read({"inputs": [BINARY]}, bytes(9), spaces)
        for data in (None, 1, {"a": 1}):
            with pytest.raises(Refusal, match="attempt to access JSON non-array as array"):
                read({"inputs": [{**IN_JSON, "data": data}]}, b"", spaces)


@pytest.mark.parametrize("parameters", [{}, {"p": 1}])
@pytest.mark.parametrize("name", ["", 'a "quoted" id'])
def test_an_answer_says_what_it_is_asked_to(name: str, parameters: Any) -> None:
    arrays: dict[str, Any] = {"A": np.arange(6, dtype=np.float32).reshape(2, 3), "B": np.array([[7]], np.int64)}
    outputs = tuple(OutputTensor(key, BY_NUMPY[array.dtype], array) for key, array in arrays.items())
    for rows in (1, 2):  # shapes that differ are not taken for one another
        cut = tuple(OutputTensor(each.name, each.datatype, each.array[:rows]) for each in outputs)
        body, length = format_response(InferResponse("m", rows, cut, name, parameters), Form(frozenset("A")))
        assert length
        fields = json.loads(body[:length])
        assert fields == {
            **({"id": name} if name else {}),
            "model_name": "m",
            "model_version": str(rows),
            **({"parameters": parameters} if parameters else {}),
            "outputs": [
                {"name": "A", "datatype": "FP32", "shape": [rows, 3], "parameters": {"binary_data_size": 12 * rows}},
                {"name": "B", "datatype": "INT64", "shape": [1, 1], "data": [7]},
            ],
        }
        assert body[length:] == arrays["A"][:rows].tobytes()
