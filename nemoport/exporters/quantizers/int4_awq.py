"""INT4 AWQ (arXiv:2306.00978): signed 4-bit numbers in groups along the input. ModelOpt's W4A16_AWQ.

Two rows lie in a byte, row 2n in the low nibble and row 2n + 1 in the high one, in two's complement.
y = (x * pre_scale) w', w'[o, i] = weight[o, i] * scale[o, i / group]: w = w' * pre_scale. Where a norm feeds the layer,
ModelOpt has multiplied pre_scale into the norm's weight, and the layer has none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemoport.exporters.arithmetic import ARITHMETIC, Arithmetic
from nemoport.exporters.computed import Array, Once, Single, computed, single
from nemoport.exporters.dtypes import real
from nemoport.exporters.encoding import FLOATS, Encoding, Field, Form
from nemoport.exporters.packing import FOUR_BITS
from nemoport.exporters.quantizers.int8 import SHAPE
from nemoport.exporters.quantizing import TOGETHER, Fields, Given
from nemoport.exporters.smoothing import PRE_SCALE, mean_share, smoothed
from nemoport.exporters.tensor import LazyTensor

Groups = Single
"""float32 [rows, groups, inputs of a group]."""

ALGORITHM = "W4A16_AWQ"
NEEDS = {
    "modelopt": ("mean", "losses"),
    "trtllm": ("mean", "losses"),
    "compressed-tensors": ("mean", "losses"),
    "onnx": ("mean", "losses"),
}
SHARES = {"modelopt": TOGETHER, "trtllm": TOGETHER[:1], "compressed-tensors": TOGETHER, "onnx": TOGETHER}
GROUP = 128
PAIRS = ((0, 2), (1, 1))
MOST = np.float32(7)
EXPONENTS = tuple(float(each) for each in np.arange(11, dtype=np.float32) * np.float32(0.1))
"""Those that are tried. The larger, the more an input that is large on average spares its weights the rounding."""
_LEAST, _MOST = np.float32(1e-4), np.float32(1e4)
_TINY = np.finfo(np.float32).tiny


def encoding(group: int | None) -> Encoding:
    group = group or GROUP
    return Encoding(
        "int4_awq",
        (
            Field(
                "weight",
                ("uint8",),
                PAIRS,
                {
                    "modelopt": Form("weight"),
                    "trtllm": Form("weight", dtype="int8"),
                    "compressed-tensors": Form("weight_packed", packing=FOUR_BITS),
                    "onnx": Form("weight"),
                },
            ),
            Field("scale", ("float32",), ((0, 1), (1, group)), _forms("weight_scale", "weights_scaling_factor")),
            SHAPE,
            Field("pre_scale", FLOATS, ((1, 1),), PRE_SCALE, 1.0),
        ),
        group=group,
        loads={
            "modelopt": ("TensorRT-LLM 1.0 or later (PyTorch backend)",),
            "trtllm": ("TensorRT-LLM 0.8 to 1.2 (trtllm-build)", "NIM 1.x"),
            "compressed-tensors": ("vLLM", "transformers with compressed-tensors"),
            "onnx": ("ONNX Runtime 1.23 or later", "TensorRT 10.15 or later"),
        },
    )


def _forms(modelopt: str, trtllm: str) -> dict[str, Form]:
    return {
        "modelopt": Form(modelopt),
        "trtllm": Form(trtllm),
        "compressed-tensors": Form(modelopt, dtypes=FLOATS),
        "onnx": Form("scale"),
    }


def dequantize(fields: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
    pairs, scale = fields["weight"].view(np.uint8), fields["scale"].astype(np.float32)
    nibbles = np.stack([pairs & 15, pairs >> 4], axis=1).reshape(2 * pairs.shape[0], pairs.shape[1])
    numbers = (nibbles.astype(np.int8) ^ 8) - np.int8(8)
    group = -(-numbers.shape[1] // scale.shape[1])
    whole: NDArray[np.float32] = numbers * np.repeat(scale, group, axis=1)[:, : numbers.shape[1]]
    return whole * fields["pre_scale"].astype(np.float32) if "pre_scale" in fields else whole


def quantize(given: Given) -> tuple[Fields, ...]:
    exact = ARITHMETIC[given.dialect]
    if not given.pre_scaled:
        apart = zip(given.weights, given.largest(), strict=True)
        return tuple(rounded_groups(weight, largest, exact) for weight, largest in apart)
    each = smoothed(given, lambda index: _pre_scale(given, index))
    pairs = zip(each, given.largest(), strict=True)
    return tuple({**rounded_groups(one.weight, largest, exact), "pre_scale": one.pre_scale} for one, largest in pairs)


def _pre_scale(given: Given, index: int) -> Single:
    losses = given.losses(given.names[index])
    share = mean_share(given.weights[index], GROUP)
    return np.float32(1) / stretch(given.saw("mean"), share, EXPONENTS[int(losses.argmin())])


def stretch(mean: Single, share: Single, exponent: float) -> Single:
    """What each input's weights are multiplied with: mean |x_j|^a / (mean share of w_j)^(1 - a), about 1."""
    with np.errstate(over="ignore"):  # an input whose weights are all zero has no share
        scale = mean ** np.float32(exponent) / (share ** np.float32(1 - exponent) + _TINY)
    scale = np.clip(scale, _LEAST, _MOST).astype(np.float32)
    centred: Single = scale / np.sqrt(scale.max() * scale.min())
    return centred


def scales(groups: Groups) -> Single:
    """max |w| / 7 of each group; 1 where all are zero."""
    found: Single = np.abs(groups).max(axis=2) / MOST
    found[found == 0] = 1
    return found


def rounded_groups(
    weight: LazyTensor,
    largest: Once[np.float32],
    exact: Arithmetic = ARITHMETIC["modelopt"],
    scaled: Callable[[Groups], Single] | None = None,
    group: int | None = None,
) -> Fields:
    """Weight and scale of a matrix; `largest` has seen that it can be quantized at all. `scaled` gives other scales
    than the dialect's."""
    kind, dtype = real(weight.dtype), exact.dtype(weight.dtype)

    def scaling(groups: Groups) -> Single:
        return scaled(groups) if scaled else exact.scale(np.abs(groups).max(axis=2), MOST, kind)

    size = group or GROUP

    def grouped(block: Array) -> Groups:
        largest()
        return single(block).reshape(len(block), -1, size)

    def codes(block: Array, _: object) -> Array:
        groups = grouped(block)
        numbers = np.clip(np.rint(exact.divided(groups, scaling(groups)[:, :, None], kind)), -MOST - 1, MOST).astype(
            np.int8
        )
        nibbles: Array = numbers.reshape(block.shape).view(np.uint8) & 15
        pairs: Array = nibbles[0::2] | nibbles[1::2] << 4
        return pairs

    def scales_of(block: Array, _: object) -> Array:
        return scaling(grouped(block)).astype(real(dtype))

    together = (2, size)
    return {
        "weight": computed(weight, PAIRS, "uint8", codes, together),
        "scale": computed(weight, ((0, 1), (1, size)), dtype, scales_of, together),
    }


def rounded_numbers(numbers: Single) -> Single:
    """What float32 [rows, inputs] become in groups, for the search. ModelOpt's search multiplies where its export
    divides (`_tensor_quant` of 0.47), and of bfloat16 numbers many lie halfway between two codes."""
    groups = numbers.reshape(len(numbers), -1, GROUP)
    largest: Single = np.abs(groups).max(axis=2, keepdims=True)
    largest[largest == 0] = 1
    steps: Single = MOST / largest
    whole: Single = np.clip(np.rint(groups * steps), -MOST - 1, MOST) / steps
    return whole.reshape(numbers.shape)
