"""NVFP4: E2M1 numbers in blocks of 16 along the input, an E4M3 scale for each block and one scale for all of these.
ModelOpt's NVFP4.

Two inputs lie in a byte, the even one in the low nibble. w[o, i] = weight[o, i] * scale[o, i / 16] * scale_2, where
scale_2 = max |w| / (6 * 448). compressed-tensors stores
6 * 448 / max |w| and divides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemoport.exporters.computed import Array, Once, Single, computed, single, solved
from nemoport.exporters.dtypes import real
from nemoport.exporters.encoding import SCALAR, Encoding, Field, Form
from nemoport.exporters.nearest import E4M3, e4m3
from nemoport.exporters.quantizing import TOGETHER, Fields, Given, input_amax, joint
from nemoport.exporters.tensor import LazyTensor

ALGORITHM = "NVFP4"
NEEDS = {"modelopt": ("amax",), "trtllm": ("amax",), "compressed-tensors": ("amax",)}
SHARES = {"modelopt": TOGETHER, "trtllm": TOGETHER, "compressed-tensors": TOGETHER}
RECIPROCALS = {"scale_2": "global_scale", "input_scale": "input_global_scale"}
"""What one dialect stores, and another the reciprocal of."""
UNCALIBRATED = "nvfp4_weights"
"""What it is without statistics."""
PAIRS = ((0, 1), (1, 2))
BLOCK = 16
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_NUMBERS = np.concatenate([_E2M1, -_E2M1])
"""What the 16 nibbles stand for."""


def encoding(group: int | None) -> Encoding:
    block = group or BLOCK
    scales = {**_forms("weight_scale", "weights_scaling_factor"), **_other("weight_scale")}
    return Encoding(
        "nvfp4",
        (
            Field("weight", ("uint8",), PAIRS, {**_forms("weight", "weight"), **_other("weight_packed")}),
            Field("scale", (E4M3,), ((0, 1), (1, block)), scales),
            Field("scale_2", ("float32",), SCALAR, _forms("weight_scale_2", "weights_scaling_factor_2")),
            Field("input_scale", ("float32",), SCALAR, _forms("input_scale", "activation_scaling_factor")),
            Field("global_scale", ("float32",), SCALAR, _other("weight_global_scale", single=True)),
            Field("input_global_scale", ("float32",), SCALAR, _other("input_global_scale", single=True)),
        ),
        group=block,
        loads={
            "modelopt": ("vLLM", "SGLang", "TensorRT-LLM 1.0 or later (PyTorch backend)"),
            "trtllm": ("TensorRT-LLM up to 1.2 on GPUs of SM 100 or later, not seen loading",),
            "compressed-tensors": ("vLLM",),
        },
        refused={"onnx": "ONNX Runtime has no kernel for 4-bit floats"},
    )


def _forms(modelopt: str, trtllm: str) -> dict[str, Form]:
    return {"modelopt": Form(modelopt), "trtllm": Form(trtllm)}


def _other(suffix: str, *, single: bool = False) -> dict[str, Form]:
    return {"compressed-tensors": Form(suffix, single=single)}


def dequantize(fields: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
    pairs, scale = fields["weight"], fields["scale"].astype(np.float32)
    nibbles = np.stack([pairs & 15, pairs >> 4], axis=2).reshape(pairs.shape[0], 2 * pairs.shape[1])
    block = -(-nibbles.shape[1] // scale.shape[1])
    each = scale / fields["global_scale"] if "global_scale" in fields else scale * fields["scale_2"]
    scales = np.repeat(each.astype(np.float32), block, axis=1)[:, : nibbles.shape[1]]
    whole: NDArray[np.float32] = _NUMBERS[nibbles] * scales
    return whole


def quantize(given: Given) -> tuple[Fields, ...]:
    one = joint(given.largest())
    if given.dialect == "compressed-tensors":
        return _as_compressed_tensors(given, one)
    whole = Once(lambda: np.float32(one() / _RANGE))
    shared = {
        "scale_2": solved((), "float32", lambda: np.array(whole())),
        "input_scale": solved((), "float32", lambda: np.array(input_amax(given) / _RANGE)),
    }
    return tuple({**_blocks(weight, *_as_modelopt(whole)), **shared} for weight in given.weights)


_RANGE = np.float32(6 * 448)
_LEAST, _MOST = np.float32(2**-9), np.float32(448)
_EPSILON = np.float32(2**-3)
"""E4M3's: what compressed-tensors has for a scale that rounds to zero."""
_HALVES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Half-way between neighbours of E2M1; from one of an even code, a tie goes down."""


def _as_compressed_tensors(given: Given, one: Once[np.float32]) -> tuple[Fields, ...]:
    """The global scale in float32, that of a block from its largest sixth in the weight's own dtype."""
    kind = real(given.weights[0].dtype)
    whole = Once(lambda: np.float32(np.float32(1) / one() * _RANGE))  # in torch's order

    def scales(numbers: Single) -> Array:
        sixth = single((_largest(numbers) / np.float32(6)).astype(kind))
        found = e4m3(np.minimum(sixth * whole(), _MOST))
        apart: Array = np.where(found == 0, _EPSILON.astype(found.dtype), found)
        return apart

    def steps(scale: Array) -> Single:
        step: Single = single(scale) / whole()
        return step

    shared = {"global_scale": solved((), "float32", lambda: np.array(whole()))}
    if given.calibrated:
        shared["input_global_scale"] = solved((), "float32", lambda: np.array(_RANGE / input_amax(given)))
    return tuple({**_blocks(weight, scales, steps), **shared} for weight in given.weights)


def _largest(numbers: Single) -> Single:
    """Of each block."""
    found: Single = np.abs(numbers).ravel()
    while found.size * BLOCK > numbers.size:  # numpy takes a maximum of 16 by 16 six times as slowly
        found = np.maximum(found[0::2], found[1::2])
    return found.reshape(len(numbers), -1)


def _as_modelopt(whole: Once[np.float32]) -> tuple[Callable[[Single], Array], Callable[[Array], Single]]:
    def scales(numbers: Single) -> Array:
        """[rows, blocks]; of a block of zeros, 1."""
        blocks = _largest(numbers) / (np.float32(6) * whole())
        blocks = np.where(blocks == 0, np.float32(1), blocks)
        found: Array = e4m3(np.clip(blocks, _LEAST, _MOST))
        return found

    def steps(scale: Array) -> Single:
        step: Single = single(scale) * whole()
        return step

    return scales, steps


def _blocks(weight: LazyTensor, scales: Callable[[Single], Array], steps: Callable[[Array], Single]) -> Fields:
    """`scales` of numbers are stored for blocks; `steps` are what they come to."""

    def codes(block: Array, _: object) -> Array:
        numbers = single(block)
        each = steps(scales(numbers))
        quotient = numbers.reshape(len(numbers), -1, BLOCK) / each[:, :, None]
        size, nibbles = np.abs(quotient), (quotient < 0).astype(np.uint8) << 3
        for code, half in enumerate(_HALVES):
            nibbles += size > np.float32(half) if code % 2 == 0 else size >= np.float32(half)
        pairs = nibbles.reshape(len(numbers), -1, 2)
        return pairs[:, :, 0] | pairs[:, :, 1] << 4

    together = (1, BLOCK)
    return {
        "weight": computed(weight, PAIRS, "uint8", codes, together),
        "scale": computed(weight, ((0, 1), (1, BLOCK)), E4M3, lambda block, _: scales(single(block)), together),
    }
