"""How a target wants a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

VocabPolicy = Literal["true", "padded"]
Weights = Literal["model", "optimizer"]
"""Those that the model computes with, or the float32 copies of them that the optimizer kept."""

Profile = Literal["portable", "ort"]
"""Whose operators an ONNX graph has: ONNX's alone, or ONNX Runtime's as well."""

DTYPES = ("float32", "float16", "bfloat16")
"""The dtypes that `--dtype` takes."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is quantized."""

    method: str
    """The module in `quantizers/`."""
    kv_cache: str | None = None
    exclude: tuple[str, ...] = ()
    """Patterns of linears that stay as they are, beside those that always do."""
    calibration: str | None = None
    """What its statistics were taken from: a digest of the tokens, or of the statistics themselves."""
    group: int | None = None
    """Inputs that share a scale; the method's own number when None."""
    requantize: bool = False
    """The source is quantized already and is undone first."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a target cuts and casts a model. `ep` divides `tp`; the world is tp * pp ranks, of which ep at a time have
    other experts, and tp / ep cut the same ones. dtype None keeps each tensor's own."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    dtype: str | None = None
    vocab: VocabPolicy = "true"
    weights: Weights = "model"
    recipe: Recipe | None = None
    dialect: str | None = None
    """In which quantized weights are written; None is the source's own, or the target's first."""
    profile: Profile = "portable"

    @property
    def world(self) -> int:
        return self.tp * self.pp

    @property
    def expert_tp(self) -> int:
        """Over how many ranks an expert is cut."""
        return self.tp // self.ep
