"""INT8, weights only: one scale for each row. ModelOpt's W8A16.

w[o, i] = weight[o, i] * scale[o], scale[o] = max |w[o]| / 127.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemoport.exporters.arithmetic import ARITHMETIC, Arithmetic, Kind
from nemoport.exporters.computed import Array, Once, Single, computed, single
from nemoport.exporters.dtypes import real
from nemoport.exporters.encoding import EVERY, FLOATS, SCALAR, Encoding, Field, Form
from nemoport.exporters.packing import EIGHT_BITS
from nemoport.exporters.quantizing import APART, Fields, Given
from nemoport.exporters.tensor import LazyTensor

ALGORITHM = "W8A16"
NEEDS: Mapping[str, tuple[str, ...]] = {"modelopt": (), "compressed-tensors": (), "onnx": ()}
SHARES = {"modelopt": APART, "compressed-tensors": APART, "onnx": APART}
MOST = np.float32(127)
ROW = ((0, 1),)
WHOLE_ROWS = (1, 0)
SCALES = {"modelopt": Form("weight_scale"), "compressed-tensors": Form("weight_scale", apart=True, dtypes=FLOATS)}
PACKED = Form("weight_packed", packing=EIGHT_BITS)
SHAPE = Field("shape", ("int64",), SCALAR, {"compressed-tensors": Form("weight_shape")}, of_shape=True)
"""What packed words do not tell."""


def encoding(group: int | None) -> Encoding:
    return Encoding(
        "int8",
        (
            Field(
                "weight",
                ("int8",),
                EVERY,
                {"modelopt": Form("weight"), "compressed-tensors": PACKED, "onnx": Form("weight")},
            ),
            Field("scale", ("float32",), ROW, {**SCALES, "onnx": Form("scale")}),
            SHAPE,
        ),
        loads={
            "modelopt": ("what reads the W8A16 layout of NVIDIA ModelOpt",),
            "compressed-tensors": ("vLLM", "transformers with compressed-tensors"),
            "onnx": ("ONNX Runtime 1.23 or later", "TensorRT 10.15 or later"),
        },
        refused={"trtllm": "TensorRT-LLM's loader rejects it and quantizes plain weights to W8A16 itself"},
    )


def dequantize(fields: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
    numbers: NDArray[np.float32] = fields["weight"].astype(np.float32) * fields["scale"].astype(np.float32)[:, None]
    return numbers


def quantize(given: Given) -> tuple[Fields, ...]:
    pairs = zip(given.weights, given.largest(), strict=True)
    return tuple(rows(weight, largest, ARITHMETIC[given.dialect]) for weight, largest in pairs)


def rows(weight: LazyTensor, largest: Once[np.float32], exact: Arithmetic) -> Fields:
    """Weight and scale of a matrix, each row by itself; `largest` has seen that it can be quantized at all."""
    kind, dtype = real(weight.dtype), exact.dtype(weight.dtype)

    def scales(block: Array) -> Single:
        return row_scales(single(block), MOST, largest, exact, kind)

    def codes(block: Array, _: object) -> Array:
        found: Array = np.clip(np.rint(exact.divided(single(block), scales(block)[:, None], kind)), -128, 127).astype(
            np.int8
        )
        return found

    return {
        "weight": computed(weight, EVERY, "int8", codes, WHOLE_ROWS),
        "scale": computed(weight, ROW, dtype, lambda block, _: scales(block).astype(real(dtype)), WHOLE_ROWS),
    }


def row_scales(numbers: Single, most: np.float32, largest: Once[np.float32], exact: Arithmetic, kind: Kind) -> Single:
    """Of each row of numbers, of any axes before the last."""
    largest()
    return exact.scale(np.abs(numbers).max(axis=-1), most, kind)
