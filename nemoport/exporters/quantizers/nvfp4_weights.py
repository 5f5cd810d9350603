"""NVFP4, weights only: as NVFP4, and the input stays as it is, so that nothing need be calibrated. ModelOpt's
W4A16_NVFP4."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from nemoport.exporters.encoding import Encoding
from nemoport.exporters.quantizers import nvfp4
from nemoport.exporters.quantizers.nvfp4 import RECIPROCALS, dequantize
from nemoport.exporters.quantizing import TOGETHER, Fields, Given

__all__ = ["ALGORITHM", "NEEDS", "RECIPROCALS", "SHARES", "dequantize", "encoding", "quantize"]

ALGORITHM = "W4A16_NVFP4"
NEEDS: Mapping[str, tuple[str, ...]] = {"modelopt": (), "compressed-tensors": ()}
SHARES = {"modelopt": TOGETHER, "compressed-tensors": TOGETHER}


def encoding(group: int | None) -> Encoding:
    whole = nvfp4.encoding(group)
    return replace(
        whole,
        method="nvfp4_weights",
        fields=tuple(
            replace(each, forms={name: form for name, form in each.forms.items() if name in NEEDS})
            for each in whole.fields
            if _kept(each.name)
        ),
        loads={
            "modelopt": ("what reads the W4A16_NVFP4 layout of NVIDIA ModelOpt",),
            "compressed-tensors": ("vLLM",),
        },
        refused={
            "trtllm": "TensorRT-LLM's rank files of NVFP4 have a scale for the input; give --calib FILE",
            "onnx": "ONNX Runtime has no kernel for 4-bit floats",
        },
    )


def _kept(field: str) -> bool:
    return not field.startswith("input_")


def quantize(given: Given) -> tuple[Fields, ...]:
    return tuple({name: each for name, each in fields.items() if _kept(name)} for fields in nvfp4.quantize(given))
