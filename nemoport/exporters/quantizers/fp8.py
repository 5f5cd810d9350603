"""FP8: E4M3 numbers with one scale for the matrix, and one for its input. ModelOpt's FP8.

w = weight * scale, scale = max |w| / 448. ModelOpt's export for Hugging Face divides in the weight's own dtype and so
rounds twice; its export for TensorRT-LLM divides in float32, and gives linears that are fused one scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemoport.exporters.arithmetic import ARITHMETIC
from nemoport.exporters.computed import Array, Compute, Once, computed, single, solved
from nemoport.exporters.dtypes import itemsize, real
from nemoport.exporters.encoding import EVERY, FLOATS, FP8_ON_CPU, SCALAR, Encoding, Field, Form
from nemoport.exporters.nearest import E4M3, e4m3
from nemoport.exporters.quantizing import APART, TOGETHER, Fields, Given, input_amax, joint
from nemoport.exporters.tensor import LazyTensor

ALGORITHM = "FP8"
NEEDS = {"modelopt": ("amax",), "trtllm": ("amax",), "compressed-tensors": ("amax",)}
SHARES = {"modelopt": APART, "trtllm": TOGETHER, "compressed-tensors": APART}
MOST = np.float32(448)
WEIGHT = {dialect: Form("weight") for dialect in NEEDS}


def encoding(group: int | None) -> Encoding:
    return Encoding(
        "fp8",
        (
            Field("weight", (E4M3,), EVERY, WEIGHT),
            Field("scale", ("float32",), SCALAR, _forms("weight_scale", "weights_scaling_factor")),
            Field("input_scale", ("float32",), SCALAR, _forms("input_scale", "activation_scaling_factor")),
        ),
        loads={
            "modelopt": ("vLLM", "SGLang", "TensorRT-LLM 1.0 or later (PyTorch backend)"),
            "trtllm": ("TensorRT-LLM 0.8 to 1.2 (trtllm-build)", "NIM 1.x"),
            "compressed-tensors": ("vLLM", "transformers with compressed-tensors"),
        },
        refused={"onnx": FP8_ON_CPU},
    )


def _forms(modelopt: str, trtllm: str) -> dict[str, Form]:
    other = Form(modelopt, single=True, dtypes=FLOATS)
    return {"modelopt": Form(modelopt), "trtllm": Form(trtllm, single=True), "compressed-tensors": other}


def dequantize(fields: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
    numbers: NDArray[np.float32] = fields["weight"].astype(np.float32) * fields["scale"].astype(np.float32)
    return numbers


def quantize(given: Given) -> tuple[Fields, ...]:
    one, exact = joint(given.largest()), ARITHMETIC[given.dialect]
    kind, dtype = real(given.weights[0].dtype), exact.dtype(given.weights[0].dtype)
    held = real(dtype)

    def scaled(largest: np.float32) -> np.float32:
        return np.float32(exact.scale(np.asarray(single(np.asarray(largest).astype(held))), MOST, kind))

    scale = Once(lambda: scaled(one()))
    shared = {
        "scale": solved((), dtype, lambda: np.array(scale()).astype(held)),
        "input_scale": solved((), dtype, lambda: np.array(scaled(input_amax(given))).astype(held)),
    }
    divide = DIVIDE[given.dialect]
    return tuple(
        {"weight": computed(weight, EVERY, E4M3, codes(weight, scale, divide)), **shared} for weight in given.weights
    )


def _in_its_dtype(block: Array, scale: np.float32) -> Array:
    quotient: Array = (single(block) / scale).astype(block.dtype)
    return quotient


def _in_float32(block: Array, scale: np.float32) -> Array:
    quotient: Array = single(block) / scale
    return quotient


DIVIDE = {"modelopt": _in_its_dtype, "trtllm": _in_float32, "compressed-tensors": _in_its_dtype}


def codes(weight: LazyTensor, scale: Once[np.float32], divide: Callable[[Array, np.float32], Array]) -> Compute:
    """weight / scale in E4M3. A 16-bit float has 65536 values: what becomes of each is looked up."""
    if itemsize(weight.dtype) != 2:
        return lambda block, _: e4m3(single(divide(block, scale())))
    every = np.arange(1 << 16, dtype=np.uint16).view(real(weight.dtype))

    def table() -> Array:
        with np.errstate(all="ignore"):  # among all values are infinities
            return e4m3(single(divide(every, scale()))).view(np.uint8)

    found = Once(table)
    return lambda block, _: np.take(found(), block.view(np.uint16))
