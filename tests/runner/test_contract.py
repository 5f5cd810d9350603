"""Requests that a model does not take are refused in Triton's words, whatever protocol brought them."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from nemoport.runner.datatypes import BY_NAME, BY_NUMPY, BYTES, DATATYPES
from nemoport.runner.model import ModelVersion, load_version
from nemoport.runner.refusal import Code, Refusal
from nemoport.runner.request import InferRequest, InputTensor, request_of
from nemoport.runner.tensors import from_json, from_raw, join_bytes, split_bytes, to_json, to_raw

from .models import SIMPLE_CONFIG, add_sub, graph, identity, linear, write_model

ONES = np.ones((1, 16), np.int32)


@pytest.fixture(scope="module")
def simple(tmp_path_factory: pytest.TempPathFactory) -> ModelVersion:
    return load_version(write_model(tmp_path_factory.mktemp("r"), "simple", add_sub(), SIMPLE_CONFIG), "1")


def test_an_answer_has_the_outputs_asked_for_in_their_order(simple: ModelVersion) -> None:
    inputs = {"INPUT0": ONES * 5, "INPUT1": ONES}
    assert list(simple.infer(request_of(inputs)).arrays()) == ["OUTPUT0", "OUTPUT1"]
    response = simple.infer(request_of(inputs, ("OUTPUT1", "OUTPUT0"), "r7"))
    assert [output.name for output in response.outputs] == ["OUTPUT1", "OUTPUT0"]
    assert response.id == "r7"
    assert response.arrays()["OUTPUT1"].tolist() == (ONES * 4).tolist()


@pytest.mark.parametrize(
    "inputs, outputs, message",
    [
        (
            {"INPUT0": ONES},
            (),
            "[request id: <id_unknown>] expected 2 inputs but got 1 inputs for model 'simple'. Got input(s) ['INPUT0']",
        ),
        (
            {"INPUT0": ONES},
            (),
            ", but missing required input(s) ['INPUT1']. Please provide all required input(s).",
        ),
        ({}, (), "Got input(s) [], but missing required input(s) ['INPUT0','INPUT1']"),
        ({"INPUT0": ONES, "X": ONES}, (), "unexpected inference input 'X' for model 'simple'"),
        ({"INPUT0": ONES, "INPUT1": ONES}, ("NOPE",), "unexpected inference output 'NOPE' for model 'simple'"),
        (
            {"INPUT0": ONES, "INPUT1": ONES},
            ("OUTPUT0", "OUTPUT0"),
            "output 'OUTPUT0' already exists in request",
        ),
        (
            {"INPUT0": ONES, "INPUT1": ONES.astype(np.float32)},
            (),
            "inference input 'INPUT1' data-type is 'FP32', but model 'simple' expects 'INT32'",
        ),
        (
            {"INPUT0": ONES, "INPUT1": ONES[:, :8]},
            (),
            "unexpected shape for input 'INPUT1' for model 'simple'. Expected [-1,16], got [1,8]. NOTE: Setting",
        ),
        ({"INPUT0": ONES, "INPUT1": ONES[0]}, (), "input 'INPUT1' batch size does not match other inputs for 'simple'"),
        (
            {"INPUT0": np.ones((9, 16), np.int32), "INPUT1": np.ones((9, 16), np.int32)},
            (),
            "inference request batch-size must be <= 8 for 'simple'",
        ),
        ({"INPUT0": ONES[:0], "INPUT1": ONES[:0]}, (), "inference request batch-size must be >= 1 for 'simple'"),
        (
            {"INPUT0": np.array(1, np.int32), "INPUT1": ONES},
            (),
            "input 'INPUT0' has no shape but model requires batch dimension for 'simple'",
        ),
    ],
)
def test_a_request_that_does_not_fit_is_refused(
    simple: ModelVersion, inputs: dict[str, np.ndarray], outputs: tuple[str, ...], message: str
) -> None:
    with pytest.raises(Refusal) as refused:
        simple.infer(request_of(inputs, outputs))
    assert message in str(refused.value)
    assert refused.value.code is Code.INVALID_ARG


def test_raw_bytes_must_be_as_many_as_the_shape_says(simple: ModelVersion) -> None:
    tensors = [InputTensor(name, BY_NAME["INT32"], (1, 16), bytes(60)) for name in ("INPUT0", "INPUT1")]
    with pytest.raises(
        Refusal, match=r"byte size mismatch for input 'INPUT0' for model 'simple'\. Expected 64, got 60"
    ):
        simple.infer(InferRequest(tuple(tensors), id="a"))


def test_a_name_given_twice_is_refused(simple: ModelVersion) -> None:
    tensor = InputTensor("INPUT0", BY_NAME["INT32"], (1, 16), bytes(64))
    with pytest.raises(Refusal, match="input 'INPUT0' already exists"):
        simple.infer(InferRequest((tensor, tensor)))


def test_inputs_that_disagree_on_a_symbolic_dimension_are_the_client_s_fault(tmp_path: Path) -> None:
    model = load_version(
        write_model(
            tmp_path,
            "m",
            add_sub(("n",), TensorProto.FLOAT),
            "max_batch_size: 0 "
            'input [{ name: "INPUT0" data_type: TYPE_FP32 dims: -1 }, { name: "INPUT1" data_type: TYPE_FP32 dims: -1 }]'
            'output [{ name: "OUTPUT0" data_type: TYPE_FP32 dims: -1 }]',
        ),
        "1",
    )
    with pytest.raises(Refusal, match="onnx runtime error") as refused:
        model.infer(request_of({"INPUT0": np.ones(2, np.float32), "INPUT1": np.ones(3, np.float32)}))
    assert refused.value.code is Code.INVALID_ARG


def test_empty_tensors_pass_where_there_is_no_batching(tmp_path: Path) -> None:
    config = """input { name: "X" data_type: TYPE_FP32 dims: [-1, 4] }
        output { name: "Y" data_type: TYPE_FP32 dims: [-1, 3] }"""
    model = load_version(write_model(tmp_path, "m", linear(), config), "1")
    assert model.infer(request_of({"X": np.ones((0, 4), np.float32)})).arrays()["Y"].shape == (0, 3)


def test_text_goes_through_a_model_and_other_bytes_are_refused(tmp_path: Path) -> None:
    model = load_version(write_model(tmp_path, "m", identity(TensorProto.STRING, ("b", 2))), "1")
    words = np.array([["zwölf", ""], ["a\0b", "漢"]], np.object_)
    sent = np.array([[word.encode() for word in row] for row in words], np.object_)
    assert model.infer(request_of({"X": sent})).arrays()["Y"].tolist() == sent.tolist()
    with pytest.raises(Refusal, match="input 'X' is not UTF-8 text"):
        model.infer(request_of({"X": np.array([[b"\xff", b""]], np.object_)}))


def test_bfloat16_passes_the_ends_of_a_graph(tmp_path: Path) -> None:
    casts = graph(
        [helper.make_node("Cast", ["X"], ["F"], to=TensorProto.FLOAT), helper.make_node("Cast", ["F"], ["Y"], to=16)],
        [("X", TensorProto.BFLOAT16, ("b", 3))],
        [("Y", TensorProto.BFLOAT16, ("b", 3)), ("F", TensorProto.FLOAT, ("b", 3))],
    )
    x = np.array([[1.5, -2, 3]], ml_dtypes.bfloat16)
    answer = load_version(write_model(tmp_path, "m", casts), "1").infer(request_of({"X": x})).arrays()
    assert answer["Y"].dtype == ml_dtypes.bfloat16
    assert answer["Y"].tolist() == answer["F"].tolist() == x.tolist()


ARRAYS = [np.array([[0, 1, 1], [1, 0, 1]]).astype(row.numpy) for row in DATATYPES if row is not BYTES]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: str(array.dtype))
def test_raw_and_json_are_inverses_for_every_datatype(array: np.ndarray) -> None:
    datatype = BY_NUMPY[array.dtype]
    np.testing.assert_array_equal(from_raw(datatype, bytes(to_raw(datatype, array))).reshape(2, 3), array)
    if datatype.json:
        np.testing.assert_array_equal(
            from_json(datatype, to_json(datatype, array, "X"), (2, 3), "X").reshape(2, 3), array
        )
    else:
        with pytest.raises(Refusal, match=f"receiving {datatype.name} data via JSON is not supported"):
            from_json(datatype, [0], (1,), "X")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(max_size=20)))
def test_splitting_bytes_undoes_joining_them(elements: list[bytes]) -> None:
    assert split_bytes(join_bytes(elements), len(elements), "it").tolist() == elements


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=40), st.integers(0, 5))
def test_splitting_any_bytes_gives_the_count_or_a_refusal(buffer: bytes, count: int) -> None:
    try:
        elements = split_bytes(buffer, count, "it")
    except Refusal:
        return
    assert len(elements) == count
    assert join_bytes(elements) == buffer


@pytest.mark.parametrize("nested", [[1, 2, 3, 4], [[1, 2], [3, 4]], [[1], [2, 3, [4]]], [[[[1, 2, 3, 4]]]]])
def test_json_data_is_flat_or_nested_any_way(nested: list[object]) -> None:
    assert from_json(BY_NAME["INT32"], nested, (2, 2), "X").tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "datatype, data",
    [
        ("INT32", [1.0]),
        ("INT32", [True]),
        ("INT32", ["1"]),
        ("INT32", [None]),
        ("INT32", [2**31]),
        ("UINT8", [-1]),
        ("UINT64", [2**64]),
        ("BOOL", [1]),
        ("FP32", ["1"]),
        ("FP32", [10**400]),
        ("BYTES", [1]),
        ("BYTES", ["\ud800"]),
        ("INT32", [1, 2]),
        ("INT32", []),
    ],
)
def test_json_data_of_another_kind_is_refused(datatype: str, data: list[Any]) -> None:
    with pytest.raises(Refusal, match="Unable to parse 'data'"):
        from_json(BY_NAME[datatype], data, (1,), "X")


def test_floats_beyond_their_range_become_infinite() -> None:
    assert from_json(BY_NAME["FP32"], [1e300, 2], (2,), "X").tolist() == [math.inf, 2]


def test_deep_data_is_refused() -> None:
    data: list[object] = [1]
    for _ in range(min(500, sys.getrecursionlimit() // 2)):
        data = [data]
    with pytest.raises(Refusal, match="JSON nesting depth exceeds"):
        from_json(BY_NAME["INT32"], data, (1,), "X")
