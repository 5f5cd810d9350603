"""INT8 SmoothQuant (arXiv:2211.10438): int8 rows, int8 input divided among the columns before. ModelOpt's
W8A8_SQ_PER_CHANNEL.

y = (x * pre_scale) w', w'[o, i] = weight[o, i] * scale[o]: w = w' * pre_scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemoport.exporters.encoding import EVERY, FLOATS, SCALAR, Encoding, Field, Form
from nemoport.exporters.quantizers import int8
from nemoport.exporters.quantizers.int4_awq import PRE_SCALE

ALGORITHM = "W8A8_SQ_PER_CHANNEL"


def encoding(group: int | None) -> Encoding:
    return Encoding(
        "int8_sq",
        (
            Field("weight", ("int8",), EVERY, {"modelopt": Form("weight"), "trtllm": Form("weight")}),
            Field("scale", ("float32",), ((0, 1),), _forms("weight_scale", Form("weights_scaling_factor"))),
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
        },
    )


def _forms(modelopt: str, trtllm: Form) -> dict[str, Form]:
    return {"modelopt": Form(modelopt), "trtllm": trtllm}


def dequantize(fields: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
    numbers = int8.dequantize(fields)
    return numbers * fields["pre_scale"].astype(np.float32) if "pre_scale" in fields else numbers
