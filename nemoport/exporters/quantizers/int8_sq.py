"""INT8 SmoothQuant (arXiv:2211.10438): int8 rows, int8 input divided among the columns before. ModelOpt's
W8A8_SQ_PER_CHANNEL.

y = (x * pre_scale) w', w'[o, i] = weight[o, i] * scale[o]: w = w' * pre_scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemoport.exporters.arithmetic import ARITHMETIC
from nemoport.exporters.computed import Single, solved
from nemoport.exporters.encoding import EVERY, FLOATS, SCALAR, Encoding, Field, Form
from nemoport.exporters.quantizers import int8
from nemoport.exporters.quantizing import TOGETHER, Fields, Given, input_amax
from nemoport.exporters.smoothing import PRE_SCALE, Smoothed, column_amax, smoothed

ALGORITHM = "W8A8_SQ_PER_CHANNEL"
NEEDS = {"modelopt": ("amax",), "trtllm": ("amax",), "compressed-tensors": ("amax",)}
SHARES = {"modelopt": TOGETHER, "trtllm": TOGETHER[:1], "compressed-tensors": TOGETHER}
EXPONENT = {"modelopt": 1.0, "trtllm": 1.0, "compressed-tensors": 0.5}
"""How much of the range of the input moves into the weights: ModelOpt's default; the paper's and llm-compressor's."""
STATIC = ("modelopt", "trtllm")
"""The dialects that store a scale of the input; compressed-tensors' is found anew for every token."""
LEAST, MOST = np.float32(1e-4), np.float32(1e4)


def encoding(group: int | None) -> Encoding:
    return Encoding(
        "int8_sq",
        (
            Field("weight", ("int8",), EVERY, {dialect: Form("weight") for dialect in NEEDS}),
            Field("scale", ("float32",), int8.ROW, {**int8.SCALES, "trtllm": Form("weights_scaling_factor")}),
            Field("pre_scale", FLOATS, ((1, 1),), PRE_SCALE, 1.0),
            Field(
                "input_scale",
                ("float32",),
                SCALAR,
                _forms("input_scale", Form("activation_scaling_factor", single=True)),
            ),
        ),
        loads={
            "modelopt": ("what reads the W8A8_SQ_PER_CHANNEL layout of NVIDIA ModelOpt",),
            "trtllm": ("TensorRT-LLM 0.8 to 1.2 (trtllm-build)", "NIM 1.x"),
            "compressed-tensors": ("vLLM", "transformers with compressed-tensors"),
        },
        refused={"onnx": "the graph rounds no input with a scale of its own; int8 and int8_dynamic are written"},
    )


def _forms(modelopt: str, trtllm: Form) -> dict[str, Form]:
    return {"modelopt": Form(modelopt), "trtllm": trtllm}


def dequantize(fields: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
    numbers = int8.dequantize(fields)
    return numbers * fields["pre_scale"].astype(np.float32) if "pre_scale" in fields else numbers


def quantize(given: Given) -> tuple[Fields, ...]:
    exact = ARITHMETIC[given.dialect]
    if not given.pre_scaled:
        return tuple(int8.rows(one, most, exact) for one, most in zip(given.weights, given.largest(), strict=True))
    each = smoothed(given, lambda index: _pre_scale(given, index))
    pairs = zip(each, given.largest(), strict=True)

    def scale() -> NDArray[np.float32]:
        input_amax(given)  # refuses an input that was zero
        return np.array(max(_input_amax(given, one) for one in each) / int8.MOST)

    of_input = {"input_scale": solved((), "float32", scale)} if given.dialect in STATIC else {}
    return tuple(
        {**int8.rows(one.weight, largest, exact), "pre_scale": one.pre_scale, **of_input} for one, largest in pairs
    )


def _pre_scale(given: Given, index: int) -> Single:
    """Of each input: max |w_j|^(1 - a) / max |x_j|^a, and 1 where it was never anything but zero."""
    seen = given.saw("amax")
    weight = column_amax(given.weights[index]) ** np.float32(1 - EXPONENT[given.dialect])
    with np.errstate(divide="ignore"):
        scale = weight / seen ** np.float32(EXPONENT[given.dialect])
    return np.where(seen > 0, np.clip(scale, LEAST, MOST), np.float32(1)).astype(np.float32)


def _input_amax(given: Given, one: Smoothed) -> np.float32:
    """Of the input after its own pre-scale, in the weight's dtype, as ModelOpt takes it."""
    seen = given.saw("amax").astype(one.kind).astype(np.float32)
    return np.float32((seen * one.own()).max().astype(one.kind))
