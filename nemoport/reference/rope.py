"""Rotary position embedding: pairs of a head's elements turned by an angle that grows with the position."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nemoport.spec import LinearScaling, Llama3Scaling, Rope, YarnScaling


def frequencies(rope: Rope) -> Tensor:
    """Radians per position of each pair, [dims / 2]; in float32, as models are trained with."""
    exponents = torch.arange(0, rope.dims, 2, dtype=torch.float32) / rope.dims
    periods = rope.base**exponents
    plain = 1.0 / periods
    match rope.scaling:
        case None:
            return plain
        case LinearScaling(factor=factor):
            return plain / factor
        case Llama3Scaling() as scaling:
            return _by_wavelength(plain, scaling)
        case YarnScaling() as scaling:
            return _by_number(plain, 1.0 / (scaling.factor * periods), rope, scaling)


def rotate(x: Tensor, positions: Tensor, rope: Rope) -> Tensor:
    """Turn the first `dims` of x [batch, heads, length, head_dim] by positions [batch, length]. Angles are float32,
    their cosines and products of x's dtype, as in transformers and vLLM."""
    angles = positions[:, None, :, None] * frequencies(rope).to(x.device)
    cos, sin = ((part * rope.magnitude).to(x.dtype) for part in (angles.cos(), angles.sin()))
    paired, rest = x[..., : rope.dims], x[..., rope.dims :]
    if rope.interleaved:
        first, second = paired[..., 0::2], paired[..., 1::2]
    else:
        first, second = paired.chunk(2, dim=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    placed = torch.stack(turned, dim=-1).flatten(-2) if rope.interleaved else torch.cat(turned, dim=-1)
    return torch.cat([placed, rest], dim=-1)


def _by_wavelength(plain: Tensor, scaling: Llama3Scaling) -> Tensor:
    """A pair that turns `high_freq_factor` times or more within the original context keeps its frequency, one that
    turns `low_freq_factor` times or fewer is slowed by `factor`, and a straight ramp lies between."""
    turns = scaling.original_max_positions * plain / (2 * math.pi)
    ramp = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = ramp.clamp(0, 1)
    return plain * (kept + (1 - kept) / scaling.factor)


def _by_number(plain: Tensor, slowed: Tensor, rope: Rope, scaling: YarnScaling) -> Tensor:
    """The ramp lies over the numbers of the pairs, between those that turn `beta_fast` and `beta_slow` times within the
    original context; neither number need be whole, nor that of a pair that there is."""

    def number(turns: float) -> float:
        return rope.dims * math.log(scaling.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.base))

    low, high = number(scaling.beta_fast), number(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dims - 1)  # as transformers and Megatron-core clamp them
    ramp = (torch.arange(rope.dims // 2, dtype=torch.float32) - low) / ((high - low) or 0.001)
    kept = 1 - ramp.clamp(0, 1)
    return slowed * (1 - kept) + plain * kept
