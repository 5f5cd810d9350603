"""Small ONNX models and the repositories that hold them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

Shape = Sequence[int | str]
WEIGHT = np.arange(12, dtype=np.float32).reshape(4, 3) / 8

SIMPLE_CONFIG = """
name: "simple"
backend: "onnxruntime"
max_batch_size: 8
input [ { name: "INPUT0" data_type: TYPE_INT32 dims: [ 16 ] }, { name: "INPUT1" data_type: TYPE_INT32 dims: [ 16 ] } ]
output [ { name: "OUTPUT0" data_type: TYPE_INT32 dims: 16 }, { name: "OUTPUT1" data_type: TYPE_INT32 dims: 16 } ]
"""


def graph(
    nodes: Sequence[onnx.NodeProto],
    inputs: Iterable[tuple[str, int, Shape]],
    outputs: Iterable[tuple[str, int, Shape]],
    weights: Iterable[onnx.TensorProto] = (),
) -> onnx.ModelProto:
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(*tensor) for tensor in inputs],
        [helper.make_tensor_value_info(*tensor) for tensor in outputs],
        list(weights),
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def add_sub(shape: Shape = ("batch", 16), elem_type: int = TensorProto.INT32) -> onnx.ModelProto:
    """OUTPUT0 = INPUT0 + INPUT1, OUTPUT1 = INPUT0 - INPUT1."""
    nodes = [
        helper.make_node("Add", ["INPUT0", "INPUT1"], ["OUTPUT0"]),
        helper.make_node("Sub", ["INPUT0", "INPUT1"], ["OUTPUT1"]),
    ]
    tensors = [(name, elem_type, shape) for name in ("INPUT0", "INPUT1", "OUTPUT0", "OUTPUT1")]
    return graph(nodes, tensors[:2], tensors[2:])


def linear(scale: float = 1.0) -> onnx.ModelProto:
    """Y [batch, 3] = X [batch, 4] @ WEIGHT * scale."""
    weight = onnx.numpy_helper.from_array(WEIGHT * np.float32(scale), "W")
    node = helper.make_node("MatMul", ["X", "W"], ["Y"])
    return graph([node], [("X", TensorProto.FLOAT, ("batch", 4))], [("Y", TensorProto.FLOAT, ("batch", 3))], [weight])


def identity(elem_type: int, shape: Shape) -> onnx.ModelProto:
    return graph([helper.make_node("Identity", ["X"], ["Y"])], [("X", elem_type, shape)], [("Y", elem_type, shape)])


def write_model(
    repository: Path, name: str, model: onnx.ModelProto, config: str | None = None, versions: Sequence[str] = ("1",)
) -> Path:
    """The same model under every version."""
    for version in versions:
        directory = repository / name / version
        directory.mkdir(parents=True, exist_ok=True)
        onnx.save(model, directory / "model.onnx")
    if config is not None:
        write_config(repository / name, config)
    return repository / name


def write_config(model: Path, config: str) -> None:
    (model / "config.pbtxt").write_text(config)
