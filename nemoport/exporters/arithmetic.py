"""How a dialect works out scales and quotients: ModelOpt in float32; compressed-tensors in the weight's own dtype, with
half of the range of the numbers (127.5, 7.5) where ModelOpt has the largest (127, 7)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from nemoport.exporters.computed import Single, single

Kind = np.dtype[Any]


class Arithmetic(Protocol):
    def dtype(self, weight: str) -> str:
        """That of scales, for a weight's."""
        ...

    def scale(self, largest: Single, most: np.float32, kind: Kind) -> Single:
        """Of numbers up to `largest` in codes up to `most`; of zeros, any that is not zero."""
        ...

    def divided(self, numbers: Single, scale: Single, kind: Kind) -> Single: ...


@dataclass(frozen=True)
class InFloat32:
    def dtype(self, weight: str) -> str:
        return "float32"

    def scale(self, largest: Single, most: np.float32, kind: Kind) -> Single:
        found: Single = largest / most
        return np.where(found == 0, np.float32(1), found)

    def divided(self, numbers: Single, scale: Single, kind: Kind) -> Single:
        quotient: Single = numbers / scale
        return quotient


@dataclass(frozen=True)
class InItsDtype:
    """calculate_qparams and quantize of compressed-tensors 0.20."""

    def dtype(self, weight: str) -> str:
        return weight

    def scale(self, largest: Single, most: np.float32, kind: Kind) -> Single:
        half = np.float32(HALVES.get(float(most), float(most)))
        found = _rounded(largest / _rounded(half, kind), kind)
        return np.where(found == 0, np.float32(_epsilon(kind)), found)

    def divided(self, numbers: Single, scale: Single, kind: Kind) -> Single:
        return _rounded(numbers / scale, kind)


HALVES = {127.0: 127.5, 7.0: 7.5}
ARITHMETIC: Mapping[str, Arithmetic] = {
    "modelopt": InFloat32(),
    "trtllm": InFloat32(),
    "onnx": InFloat32(),
    "compressed-tensors": InItsDtype(),
}


def _rounded(numbers: Any, kind: Kind) -> Single:
    return single(np.asarray(numbers).astype(kind))


def _epsilon(kind: Kind) -> float:
    import ml_dtypes

    found: Any = ml_dtypes.finfo
    return float(found(kind).eps)
