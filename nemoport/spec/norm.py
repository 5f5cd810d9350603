"""How numbers are normed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nemoport.spec.axes import Axis, Tensors

NormKind = Literal["rms", "layer"]


@dataclass(frozen=True, kw_only=True)
class Norm:
    """`rms`: x / rms(x) * w (arXiv:1910.07467). `layer`: (x - mean) / std * w + b (arXiv:1607.06450).
    `zero_centered`: the tensor holds w - 1 (LayerNorm1p, Gemma)."""

    kind: NormKind = "rms"
    eps: float = 1e-5
    zero_centered: bool = False

    def tensors(self, width: Axis) -> Tensors:
        return {"weight": (width,)} if self.kind == "rms" else {"weight": (width,), "bias": (width,)}
