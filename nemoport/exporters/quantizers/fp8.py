"""FP8: E4M3 numbers with one scale for the matrix, and one for its input. ModelOpt's FP8.

w = weight * scale, scale = max |w| / 448.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemoport.exporters.encoding import EVERY, SCALAR, Encoding, Field, Form

ALGORITHM = "FP8"


def encoding(group: int | None) -> Encoding:
    return Encoding(
        "fp8",
        (
            Field("weight", ("float8_e4m3fn",), EVERY, {"modelopt": Form("weight"), "trtllm": Form("weight")}),
            Field("scale", ("float32",), SCALAR, _forms("weight_scale", "weights_scaling_factor")),
            Field("input_scale", ("float32",), SCALAR, _forms("input_scale", "activation_scaling_factor")),
        ),
        loads={
            "modelopt": ("vLLM", "SGLang", "TensorRT-LLM 1.0 or later (PyTorch backend)"),
            "trtllm": ("TensorRT-LLM 0.8 to 1.2 (trtllm-build)", "NIM 1.x"),
        },
    )


def _forms(modelopt: str, trtllm: str) -> dict[str, Form]:
    return {"modelopt": Form(modelopt), "trtllm": Form(trtllm, single=True)}


def dequantize(fields: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
    numbers: NDArray[np.float32] = fields["weight"].astype(np.float32) * fields["scale"].astype(np.float32)
    return numbers
