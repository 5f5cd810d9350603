"""What a graph's dynamic INT8 linears were given and gave, and what the formula says of it, in numpy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import numpy_helper

Array = NDArray[Any]


@dataclass(frozen=True)
class Product:
    linear: str
    """Its canonical name."""
    x: Array
    y: Array
    """What ONNX Runtime made of x, without the bias."""
    weight: Array
    """[inputs, rows], int8."""
    scale: Array

    @property
    def wanted(self) -> Array:
        """Every token in 255 steps from its least number to its largest, in float32 as in the graph; then exactly."""
        least, most = self.x.min(-1, keepdims=True), self.x.max(-1, keepdims=True)
        step = np.maximum((most - least) / np.float32(255), np.float32(1e-30))
        codes = np.rint((self.x - least) / step)
        seen = codes * step.astype(np.float64) + least
        made: Array = seen @ (self.weight.astype(np.float64) * self.scale)
        return made


def products(path: Path, given: Mapping[str, Array]) -> Iterator[Product]:
    """Of every dynamic linear of the graph, asked once."""
    model = onnx.load(path)
    nodes = [node for node in model.graph.node if node.op_type == "MatMulInteger"]
    ends = [(node.input[0].removesuffix(".rounding.codes"), node.name.removesuffix(".integers")) for node in nodes]
    held = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    known = {each.name for each in (*model.graph.input, *model.graph.output)}
    for name in dict.fromkeys(name for pair in ends for name in pair if name not in known):
        model.graph.output.add(name=name)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    found = dict(zip([each.name for each in session.get_outputs()], session.run(None, dict(given)), strict=True))
    for node, (x, y) in zip(nodes, ends, strict=True):
        linear = node.input[1].removesuffix(".weight")
        yield Product(linear, found[x], found[y], held[node.input[1]], held[f"{linear}.scale"])
