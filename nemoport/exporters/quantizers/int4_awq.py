"""INT4 AWQ (arXiv:2306.00978): signed 4-bit numbers in groups along the input. ModelOpt's W4A16_AWQ.

Two rows lie in a byte, row 2n in the low nibble and row 2n + 1 in the high one, in two's complement.
y = (x * pre_scale) w', w'[o, i] = weight[o, i] * scale[o, i / group]: w = w' * pre_scale. Where a norm feeds the layer,
ModelOpt has multiplied pre_scale into the norm's weight, and the layer has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemoport.exporters.encoding import FLOATS, Encoding, Field, Form

PRE_SCALE = {"modelopt": Form("pre_quant_scale"), "trtllm": Form("prequant_scaling_factor", always=True)}
ALGORITHM = "W4A16_AWQ"
GROUP = 128


def encoding(group: int | None) -> Encoding:
    group = group or GROUP
    return Encoding(
        "int4_awq",
        (
            Field(
                "weight",
                ("uint8",),
                ((0, 2), (1, 1)),
                {"modelopt": Form("weight"), "trtllm": Form("weight", dtype="int8")},
            ),
            Field("scale", ("float32",), ((0, 1), (1, group)), _forms("weight_scale", "weights_scaling_factor")),
            Field("pre_scale", FLOATS, ((1, 1),), PRE_SCALE, 1.0),
        ),
        group=group,
        loads={
            "modelopt": ("TensorRT-LLM 1.0 or later (PyTorch backend)",),
            "trtllm": ("TensorRT-LLM 0.8 to 1.2 (trtllm-build)", "NIM 1.x"),
        },
    )


def _forms(modelopt: str, trtllm: str) -> dict[str, Form]:
    return {"modelopt": Form(modelopt), "trtllm": Form(trtllm)}


def dequantize(fields: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
    pairs, scale = fields["weight"].view(np.uint8), fields["scale"].astype(np.float32)
    nibbles = np.stack([pairs & 15, pairs >> 4], axis=1).reshape(2 * pairs.shape[0], pairs.shape[1])
    numbers = (nibbles.astype(np.int8) ^ 8) - np.int8(8)
    group = -(-numbers.shape[1] // scale.shape[1])
    whole: NDArray[np.float32] = numbers * np.repeat(scale, group, axis=1)[:, : numbers.shape[1]]
    return whole * fields["pre_scale"].astype(np.float32) if "pre_scale" in fields else whole
