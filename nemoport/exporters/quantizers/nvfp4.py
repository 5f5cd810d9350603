"""NVFP4: E2M1 numbers in blocks of 16 along the input, an E4M3 scale for each block and one scale for all of these.
ModelOpt's NVFP4.

Two inputs lie in a byte, the even one in the low nibble. w[o, i] = weight[o, i] * scale[o, i / 16] * scale_2, where
scale_2 = max |w| / (6 * 448). (Other formats store its reciprocal.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemoport.exporters.encoding import SCALAR, Encoding, Field, Form

ALGORITHM = "NVFP4"
BLOCK = 16
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_NUMBERS = np.concatenate([_E2M1, -_E2M1])
"""What the 16 nibbles stand for."""


def encoding(group: int | None) -> Encoding:
    block = group or BLOCK
    return Encoding(
        "nvfp4",
        (
            Field("weight", ("uint8",), ((0, 1), (1, 2)), {"modelopt": Form("weight"), "trtllm": Form("weight")}),
            Field("scale", ("float8_e4m3fn",), ((0, 1), (1, block)), _forms("weight_scale", "weights_scaling_factor")),
            Field("scale_2", ("float32",), SCALAR, _forms("weight_scale_2", "weights_scaling_factor_2")),
            Field("input_scale", ("float32",), SCALAR, _forms("input_scale", "activation_scaling_factor")),
        ),
        group=block,
        loads={
            "modelopt": ("vLLM", "SGLang", "TensorRT-LLM 1.0 or later (PyTorch backend)"),
            "trtllm": ("TensorRT-LLM up to 1.2 on Blackwell, as ModelOpt 0.47 writes it; not seen loading",),
        },
    )


def _forms(modelopt: str, trtllm: str) -> dict[str, Form]:
    return {"modelopt": Form(modelopt), "trtllm": Form(trtllm)}


def dequantize(fields: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
    pairs, scale = fields["weight"], fields["scale"].astype(np.float32)
    nibbles = np.stack([pairs & 15, pairs >> 4], axis=2).reshape(pairs.shape[0], 2 * pairs.shape[1])
    block = -(-nibbles.shape[1] // scale.shape[1])
    scales = np.repeat(scale * fields["scale_2"].astype(np.float32), block, axis=1)[:, : nibbles.shape[1]]
    whole: NDArray[np.float32] = _NUMBERS[nibbles] * scales
    return whole
