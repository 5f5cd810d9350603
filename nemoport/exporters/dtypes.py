"""Element types, one row each: the name used everywhere here, its width, and what other formats call it.

Bytes travel as unsigned words of the same width, so that a copy never does arithmetic and numpy never needs to know
bfloat16; `real` gives the numpy type when numbers are wanted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nemoport.errors import UnsupportedInput

Words = NDArray[np.unsignedinteger]


@dataclass(frozen=True)
class Dtype:
    name: str
    bits: int
    safetensors: str
    onnx: int
    """The value in onnx.TensorProto.DataType; 0 where ONNX has none."""


_ROWS = (
    Dtype("float64", 64, "F64", 11),
    Dtype("float32", 32, "F32", 1),
    Dtype("float16", 16, "F16", 10),
    Dtype("bfloat16", 16, "BF16", 16),
    Dtype("float8_e4m3fn", 8, "F8_E4M3", 17),
    Dtype("float8_e5m2", 8, "F8_E5M2", 19),
    Dtype("int64", 64, "I64", 7),
    Dtype("int32", 32, "I32", 6),
    Dtype("int16", 16, "I16", 5),
    Dtype("int8", 8, "I8", 3),
    Dtype("uint8", 8, "U8", 2),
    Dtype("bool", 8, "BOOL", 9),
)
DTYPES = {row.name: row for row in _ROWS}
BY_SAFETENSORS = {row.safetensors: row for row in _ROWS}


def itemsize(dtype: str) -> int:
    """Bytes of one element."""
    return DTYPES[dtype].bits // 8


def words(dtype: str) -> np.dtype[np.unsignedinteger]:
    """The unsigned type that carries the bytes of `dtype`."""
    return np.dtype(f"u{itemsize(dtype)}")


def real(dtype: str) -> np.dtype[np.generic]:
    """The numpy type in which `dtype` is a number."""
    if dtype in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        import ml_dtypes

        kind: np.dtype[np.generic] = np.dtype(getattr(ml_dtypes, dtype))
        return kind
    return np.dtype(dtype)


def known(dtype: str, what: str) -> str:
    """`dtype` when it has a row here, else an error that names the tensor."""
    if dtype not in DTYPES:
        raise UnsupportedInput(f"{what} has dtype {dtype}; nemoport reads {', '.join(DTYPES)}")
    return dtype
