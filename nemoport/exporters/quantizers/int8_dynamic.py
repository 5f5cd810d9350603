"""INT8 with dynamic inputs (W8A8, "dynamic int8"): int8 rows, and the runtime rounds every token to 8 bits.

y[o] = sum_i x'[i] weight[o, i] scale[o], scale[o] = max |w[o]| / 127; of a token, x' has 256 steps from its least
number to its largest:

x'[i] = code[i] step + min(x), step = (max(x) - min(x)) / 255, code[i] = round((x[i] - min(x)) / step)
y[o] = scale[o] (step sum_i code[i] weight[o, i] + min(x) sum[o]), sum[o] = sum_i weight[o, i]

A range for a whole tensor, as ONNX's DynamicQuantizeLinear and onnxruntime's `quantize_dynamic` take it, would make an
answer depend on what else is in its batch and on its padding; and all-MiniLM-L6-v2 then turns its vectors to a mean
cosine of 0.988 (of five texts in a batch), 0.997 here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemoport.exporters.computed import Array, computed
from nemoport.exporters.encoding import EVERY, Encoding, Field, Form
from nemoport.exporters.quantizers import int8
from nemoport.exporters.quantizing import APART, Fields, Given
from nemoport.exporters.tensor import LazyTensor

ALGORITHM = ""
"""ModelOpt has none."""
NEEDS: Mapping[str, tuple[str, ...]] = {"onnx": ()}
SHARES = {"onnx": APART}


def encoding(group: int | None) -> Encoding:
    return Encoding(
        "int8_dynamic",
        (
            Field("weight", ("int8",), EVERY, {"onnx": Form("weight")}),
            Field("scale", ("float32",), int8.ROW, {"onnx": Form("scale")}),
            Field("sum", ("float32",), int8.ROW, {"onnx": Form("sum")}),
        ),
        loads={"onnx": ("ONNX Runtime 1.23 or later on CPUs",)},
        refused={
            "modelopt": "ModelOpt has no layout of it",
            "compressed-tensors": "int8_sq is written there, whose inputs are rounded at run time too",
            "trtllm": "TensorRT-LLM's rank files have no words for it",
        },
    )


def dequantize(fields: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
    return int8.dequantize(fields)


def quantize(given: Given) -> tuple[Fields, ...]:
    return tuple({**fields, "sum": _sums(fields["weight"])} for fields in int8.quantize(given))


def _sums(codes: LazyTensor) -> LazyTensor:
    """Whole numbers, which float32 holds exactly up to rows of 132,000."""

    def summed(block: Array, _: object) -> Array:
        found: Array = block.sum(axis=1, dtype=np.float32)
        return found

    return computed(codes, int8.ROW, "float32", summed, int8.WHOLE_ROWS)
