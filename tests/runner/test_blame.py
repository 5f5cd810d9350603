"""A request that a kernel cannot follow is the client's fault, and a machine that fails is the server's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnxruntime.capi import onnxruntime_pybind11_state as ort

from nemoport.runner.blame import refused
from nemoport.runner.model import load_version
from nemoport.runner.refusal import Code, Refusal
from nemoport.runner.request import request_of

from .models import Shape, graph, write_model

FLOAT, INT = TensorProto.FLOAT, TensorProto.INT64


def of(op: str, *inputs: tuple[int, Shape], output: Shape, **attributes: object) -> onnx.ModelProto:
    """One node: inputs I0, I1..., and output O of the first one's type."""
    names = [f"I{at}" for at in range(len(inputs))]
    node = helper.make_node(op, names, ["O"], **attributes)
    made = [(name, *of_input) for name, of_input in zip(names, inputs, strict=True)]
    kind = FLOAT if op == "ConstantOfShape" else inputs[0][0]
    return graph([node], made, [("O", kind, output)])


def floats(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def numbers(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


UNFOLLOWED: Mapping[str, tuple[onnx.ModelProto, tuple[np.ndarray, ...]]] = {
    "broadcast": (of("Add", (FLOAT, [3]), (FLOAT, ["b"]), output=["c"]), (floats(3), floats(4))),
    "contract": (
        of("MatMul", (FLOAT, [3, "b"]), (FLOAT, ["c", "d"]), output=[3, "e"]),
        (floats(3, 5), floats(4, 3)),
    ),
    "look up": (of("Gather", (FLOAT, [3]), (INT, ["b"]), output=["c"]), (floats(3), numbers(1, 9))),
    "reshape": (of("Reshape", (FLOAT, ["a"]), (INT, [2]), output=["b", "c"]), (floats(3), numbers(2, 2))),
    "join": (
        of("Concat", (FLOAT, [2, "b"]), (FLOAT, [2, "d"]), output=[4, "f"], axis=0),
        (floats(2, 3), floats(2, 5)),
    ),
    "divide": (of("Range", (INT, []), (INT, []), (INT, []), output=["a"]), (numbers(0), numbers(5), numbers(0))),
    "negative": (of("ConstantOfShape", (INT, [2]), output=["a", "b"]), (numbers(-2, 5),)),
}
"""Graphs that load, and inputs of the shapes that they ask for."""


def answer_to(model: Path, *inputs: np.ndarray) -> Refusal:
    version = load_version(model, "1")
    with pytest.raises(Refusal, match=r"^(\[.*\] )?onnx runtime error \d+: Non-zero status code") as refusal:
        version.infer(request_of({f"I{at}": array for at, array in enumerate(inputs)}))
    version.close()
    return refusal.value


@pytest.mark.parametrize("name", UNFOLLOWED)
def test_inputs_that_contradict_each_other_in_a_kernel_are_the_client_s_fault(tmp_path: Path, name: str) -> None:
    model, inputs = UNFOLLOWED[name]
    assert answer_to(write_model(tmp_path, "m", model), *inputs).code is Code.INVALID_ARG


def test_a_mask_of_another_length_than_past_and_sequence_is_the_client_s_fault(fables: Path) -> None:
    version = load_version(fables / "onnx", "1")
    inputs = onnx.load(fables / "onnx/1/model.onnx", load_external_data=False).graph.input
    sizes = {"batch": 1, "sequence": 4, "past": 2, "total": 6}
    asked = {
        each.name: np.ones(
            [sizes.get(dim.dim_param, dim.dim_value) for dim in each.type.tensor_type.shape.dim],
            np.float32 if each.type.tensor_type.elem_type == FLOAT else np.int64,
        )
        for each in inputs
    }
    assert version.infer(request_of(asked)).outputs
    for length in (5, 7):
        with pytest.raises(Refusal, match=r"running \w*Attention") as refusal:
            version.infer(request_of(asked | {"attention_mask": np.ones((1, length), np.int64)}))
        assert refusal.value.code is Code.INVALID_ARG
    version.close()


@pytest.mark.parametrize("arena", "01")
def test_memory_that_is_not_there_is_the_machine_s(tmp_path: Path, arena: str) -> None:
    model = write_model(tmp_path, "m", of("ConstantOfShape", (INT, [2]), output=["a", "b"]))
    parameter = f'parameters {{ key: "enable_mem_arena" value {{ string_value: "{arena}" }} }}'
    (model / "config.pbtxt").write_text(f'backend: "onnxruntime" {parameter}')
    assert answer_to(model, numbers(1 << 23, 1 << 22)).code is Code.INTERNAL


KERNEL = (
    "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running Gemm node. Name:'fc1' Status Message: "
)


@pytest.mark.parametrize(
    "error",
    [
        # as reported in issues 584 and 645 of hacksider/Deep-Live-Cam, and 10343 of microsoft/onnxruntime
        ort.Fail(KERNEL + "cuda_call.cc:114 onnxruntime::CudaCall CUDA failure 2: out of memory ; GPU=0"),
        ort.RuntimeException(KERNEL + "cuda_call.cc:114 CudaCall CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED"),
        ort.Fail(KERNEL + "CUBLAS error executing cublasGemmHelper( Base::CublasHandle(), transB, ..."),
        ort.EPFail("[ONNXRuntimeError] : 11 : EP_FAIL : Non-zero status code returned while running TRT node."),
        ort.NoSuchFile("[ONNXRuntimeError] : 3 : NO_SUCHFILE : open file failed"),
        ort.Fail("[ONNXRuntimeError] : 1 : FAIL : Exiting due to terminate flag being set to true."),
        RuntimeError("no code of ONNX Runtime"),
    ],
)
def test_what_fails_beside_or_beneath_the_kernels_is_the_machine_s(error: Exception) -> None:
    assert refused(error).code is Code.INTERNAL


def test_it_is_said_in_the_words_of_triton_s_backend() -> None:
    error = ort.Fail("[ONNXRuntimeError] : 1 : FAIL : one line\nand another")
    assert str(refused(error)) == "onnx runtime error 1: one line\nand another"
