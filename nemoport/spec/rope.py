"""Rotary positions, and how they are stretched over a longer context."""

from __future__ import annotations

from dataclasses import dataclass
from math import log


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Position interpolation: every position is divided by `factor` (arXiv:2306.15595)."""

    factor: float


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's scaling by wavelength: long waves are slowed by `factor`, short ones kept, a ramp between
    (Hugging Face `rope_type: llama3`; Megatron-core `RotaryEmbedding._apply_scaling`)."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN (arXiv:2309.00071): pairs that turn `beta_fast` times or more within the original context keep their
    frequency, those that turn `beta_slow` times or fewer are slowed by `factor`, and a straight ramp lies between, over
    the numbers of the pairs; `truncate` moves its ends outwards to whole pairs. Cosines and sines are multiplied with
    `attention_factor`; None: temperature(mscale) / temperature(mscale_all_dim), as DeepSeek-V2 has it."""

    factor: float
    original_max_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True

    def temperature(self, mscale: float) -> float:
        return 0.1 * mscale * log(self.factor) + 1.0 if self.factor > 1 else 1.0

    @property
    def magnitude(self) -> float:
        """What cosines and sines are multiplied with."""
        if self.attention_factor is not None:
            return self.attention_factor
        return self.temperature(self.mscale) / self.temperature(self.mscale_all_dim)


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling | None


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding (arXiv:2104.09864) on the first `dims` of each head. Element j is paired with
    j + dims / 2 (half-split, `rotate_half`); `interleaved`: 2 j with 2 j + 1."""

    dims: int
    base: float = 10000.0
    scaling: RopeScaling = None
    interleaved: bool = False

    @property
    def magnitude(self) -> float:
        return self.scaling.magnitude if isinstance(self.scaling, YarnScaling) else 1.0
