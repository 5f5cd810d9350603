"""FP8 in blocks: E4M3 numbers with a scale for every 128 x 128 of them. ModelOpt's FP8_PB_WO.

w[o, i] = weight[o, i] * scale[o / 128, i / 128], scale = max |w| of the block / 448.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemoport.exporters.arithmetic import ARITHMETIC
from nemoport.exporters.computed import Array, Single, computed, single
from nemoport.exporters.dtypes import real
from nemoport.exporters.encoding import EVERY, FLOATS, FP8_ON_CPU, Encoding, Field, Form
from nemoport.exporters.nearest import E4M3, e4m3
from nemoport.exporters.quantizers.fp8 import MOST
from nemoport.exporters.quantizing import APART, Fields, Given

ALGORITHM = "fp8_pb_wo"
NEEDS: Mapping[str, tuple[str, ...]] = {"modelopt": (), "compressed-tensors": ()}
SHARES = {"modelopt": APART, "compressed-tensors": APART}
BLOCK = 128
_SCALES = {
    "modelopt": Form("weight_scale", apart=True),
    "compressed-tensors": Form("weight_scale", dtypes=FLOATS),
    "deepseek": Form("weight_scale_inv"),
}
"""DeepSeek's name says the inverse, and it is a factor as the others are."""
SQUARES = ((0, BLOCK), (1, BLOCK))


def encoding(group: int | None) -> Encoding:
    return Encoding(
        "fp8_block",
        (
            Field("weight", (E4M3,), EVERY, {dialect: Form("weight") for dialect in _SCALES}),
            Field("scale", ("float32",), SQUARES, _SCALES),
        ),
        loads={
            "modelopt": ("vLLM",),
            "compressed-tensors": ("vLLM", "transformers with compressed-tensors"),
            "deepseek": ("vLLM", "SGLang", "transformers"),
        },
        refused={"trtllm": "TensorRT-LLM's rank files have no words for it", "onnx": FP8_ON_CPU},
    )


def dequantize(fields: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
    weight = fields["weight"].astype(np.float32)
    scale = np.repeat(np.repeat(fields["scale"].astype(np.float32), BLOCK, axis=0), BLOCK, axis=1)
    numbers: NDArray[np.float32] = weight * scale[: weight.shape[0], : weight.shape[1]]
    return numbers


def quantize(given: Given) -> tuple[Fields, ...]:
    exact = ARITHMETIC[given.dialect]

    def made(weight: Any, largest: Any) -> Fields:
        kind, dtype = real(weight.dtype), exact.dtype(weight.dtype)

        def scales(block: Array) -> Single:
            """[rows / 128, inputs / 128]; the last of both may be of fewer."""
            largest()
            rows, inputs = block.shape
            padded = np.pad(np.abs(single(block)), ((0, -rows % BLOCK), (0, -inputs % BLOCK)))
            return exact.scale(padded.reshape(-(-rows // BLOCK), BLOCK, -1, BLOCK).max(axis=(1, 3)), MOST, kind)

        def codes(block: Array, _: object) -> Array:
            scale = np.repeat(np.repeat(scales(block), BLOCK, axis=0), BLOCK, axis=1)
            return e4m3(exact.divided(single(block), scale[: block.shape[0], : block.shape[1]], kind))

        together = (BLOCK, BLOCK)
        return {
            "weight": computed(weight, EVERY, E4M3, codes, together),
            "scale": computed(weight, SQUARES, dtype, lambda block, _: scales(block).astype(real(dtype)), together),
        }

    return tuple(made(weight, largest) for weight, largest in zip(given.weights, given.largest(), strict=True))
