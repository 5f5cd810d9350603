"""INT8, weights only: one scale for each row. ModelOpt's W8A16.

w[o, i] = weight[o, i] * scale[o], scale[o] = max |w[o]| / 127.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemoport.exporters.encoding import EVERY, Encoding, Field, Form

ALGORITHM = "W8A16"


def encoding(group: int | None) -> Encoding:
    return Encoding(
        "int8",
        (
            Field("weight", ("int8",), EVERY, {"modelopt": Form("weight")}),
            Field("scale", ("float32",), ((0, 1),), {"modelopt": Form("weight_scale")}),
        ),
        loads={"modelopt": ("what reads the W8A16 layout of NVIDIA ModelOpt",)},
        refused={"trtllm": "TensorRT-LLM's loader rejects it and quantizes plain weights to W8A16 itself"},
    )


def dequantize(fields: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
    numbers: NDArray[np.float32] = fields["weight"].astype(np.float32) * fields["scale"].astype(np.float32)[:, None]
    return numbers
