"""FP8 with dynamic inputs: E4M3 numbers with a scale for each row; the runtime scales every token. ModelOpt's
FP8_PER_CHANNEL_PER_TOKEN.

w[o, i] = weight[o, i] * scale[o], scale[o] = max |w[o]| / 448.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemoport.exporters.arithmetic import ARITHMETIC
from nemoport.exporters.computed import Array, Single, computed, single
from nemoport.exporters.dtypes import real
from nemoport.exporters.encoding import EVERY, FP8_ON_CPU, Encoding, Field, Form
from nemoport.exporters.nearest import E4M3, e4m3
from nemoport.exporters.quantizers import int8
from nemoport.exporters.quantizers.fp8 import MOST
from nemoport.exporters.quantizing import APART, Fields, Given

ALGORITHM = "FP8_PER_CHANNEL_PER_TOKEN"
NEEDS: Mapping[str, tuple[str, ...]] = {"modelopt": (), "compressed-tensors": ()}
SHARES = {"modelopt": APART, "compressed-tensors": APART}


def encoding(group: int | None) -> Encoding:
    return Encoding(
        "fp8_dynamic",
        (
            Field("weight", (E4M3,), EVERY, {dialect: Form("weight") for dialect in NEEDS}),
            Field("scale", ("float32",), int8.ROW, int8.SCALES),
        ),
        loads={"modelopt": ("vLLM",), "compressed-tensors": ("vLLM", "transformers with compressed-tensors")},
        refused={
            "trtllm": "TensorRT-LLM's rank files take it only with tensors that nemoport does not write",
            "onnx": FP8_ON_CPU,
        },
    )


def dequantize(fields: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
    return int8.dequantize(fields)


def quantize(given: Given) -> tuple[Fields, ...]:
    exact = ARITHMETIC[given.dialect]

    def made(weight: Any, largest: Any) -> Fields:
        kind, dtype = real(weight.dtype), exact.dtype(weight.dtype)

        def scales(block: Array) -> Single:
            return int8.row_scales(single(block), MOST, largest, exact, kind)

        def codes(block: Array, _: object) -> Array:
            return e4m3(exact.divided(single(block), scales(block)[:, None], kind))

        return {
            "weight": computed(weight, EVERY, E4M3, codes, int8.WHOLE_ROWS),
            "scale": computed(
                weight, int8.ROW, dtype, lambda block, _: scales(block).astype(real(dtype)), int8.WHOLE_ROWS
            ),
        }

    return tuple(made(weight, largest) for weight, largest in zip(given.weights, given.largest(), strict=True))
