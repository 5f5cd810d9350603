"""Tables of cosines and sines for RotaryEmbedding, as lazy tensors: computed block by block when they are written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, floor, log, pi

import numpy as np
from numpy.typing import NDArray

from nemoport.exporters.dtypes import Words, words
from nemoport.exporters.tensor import LazyTensor, Span
from nemoport.spec import LinearScaling, Llama3Scaling, Rope, YarnScaling

_ROWS = 4096
"""Positions computed at a time: a long context makes a table of many megabytes, never held here."""


@dataclass(frozen=True, eq=False)
class Table:
    """`turn(position * frequency) * magnitude`, [positions, dims / 2], float32."""

    turn: np.ufunc
    frequencies: NDArray[np.float32]
    positions: Span
    magnitude: float = 1.0
    dtype: str = "float32"

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.positions[1] - self.positions[0], len(self.frequencies))

    def cut(self, spans: tuple[Span, ...]) -> LazyTensor:
        (first, last), (start, stop) = spans
        low = self.positions[0]
        return replace(self, positions=(low + first, low + last), frequencies=self.frequencies[start:stop])

    def fill(self, out: Words) -> None:
        first, last = self.positions
        for start in range(first, last, _ROWS):
            stop = min(start + _ROWS, last)
            angles = np.outer(np.arange(start, stop, dtype=np.float32), self.frequencies)
            values = (self.turn(angles.astype(np.float64)) * self.magnitude).astype(np.float32)
            out[start - first : stop - first] = values.view(words(self.dtype))


def tables(rope: Rope, positions: int) -> tuple[Table, Table]:
    """Cosines and sines of every position that the model knows."""
    waves, every = frequencies(rope), (0, positions)
    return Table(np.cos, waves, every, rope.magnitude), Table(np.sin, waves, every, rope.magnitude)


def frequencies(rope: Rope) -> NDArray[np.float32]:
    """Radians per position of each pair of elements, [dims / 2].

    Frequencies and angles are rounded to float32 step by step, as Megatron and transformers round them: that is what
    the weights were trained with, and at position 100000 exact angles are some thousandths of a radian elsewhere.
    """
    exponents = np.arange(0, rope.dims, 2, dtype=np.float32) / np.float32(rope.dims)
    periods = (np.float64(rope.base) ** exponents).astype(np.float32)
    plain = np.float32(1) / periods
    match rope.scaling:
        case None:
            return plain
        case LinearScaling(factor=factor):
            return plain / np.float32(factor)
        case Llama3Scaling():
            return _llama3(plain, rope.scaling)
        case YarnScaling():
            return _yarn(plain, np.float32(1) / (np.float32(rope.scaling.factor) * periods), rope, rope.scaling)


def _llama3(plain: NDArray[np.float32], scaling: Llama3Scaling) -> NDArray[np.float32]:
    """Slow waves are divided by the factor, fast ones kept; between them a ramp over how often a wave turns within
    the original context."""
    turns = np.float32(scaling.original_max_positions) / (np.float32(2 * pi) / plain)
    low, high = np.float32(scaling.low_freq_factor), np.float32(scaling.high_freq_factor)
    kept = np.clip((turns - low) / (high - low), np.float32(0), np.float32(1))
    waves: NDArray[np.float32] = (1 - kept) * plain / np.float32(scaling.factor) + kept * plain
    return waves


def _yarn(
    plain: NDArray[np.float32], slowed: NDArray[np.float32], rope: Rope, scaling: YarnScaling
) -> NDArray[np.float32]:
    """Pairs before the ramp keep their frequency, those behind it are slow."""
    turns = (scaling.beta_fast, scaling.beta_slow)
    ends = [rope.dims / 2 * log(scaling.original_max_positions / (2 * pi * each)) / log(rope.base) for each in turns]
    first, last = (floor(ends[0]), ceil(ends[1])) if scaling.truncate else ends
    first, last = max(first, 0), min(last, rope.dims - 1)
    numbers = np.arange(len(plain), dtype=np.float32)
    way = np.clip((numbers - np.float32(first)) / np.float32((last - first) or 0.001), np.float32(0), np.float32(1))
    waves: NDArray[np.float32] = slowed * way + plain * (1 - way)
    return waves
