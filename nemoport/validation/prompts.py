"""The tokens that every validation runs: seeded, of awkward sizes, alone and in batches, padded on the left, and at
positions spread over all that the model knows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nemoport.spec import ModelSpec

SEED = 20
LONGEST = 96
"""Positions. Long enough for a wrong rope to turn visibly, short enough for a large model on a CPU."""
FAR = 24

Array = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Prompt:
    name: str
    tokens: Array
    """[batch, length]."""
    mask: Array
    """[batch, length]; 0 at padding."""
    positions: Array
    """[batch, length]: where each token stands; 0 at padding."""
    token_types: Array | None = None
    """[batch, length]"""
    dimensions: Array | None = None
    """[batch]"""

    @property
    def real(self) -> NDArray[np.bool_]:
        return self.mask.astype(np.bool_)

    @property
    def turned(self) -> Prompt:
        """The same rows, last first."""
        return self.taken(slice(None, None, -1), slice(None))

    def taken(self, rows: slice, columns: slice) -> Prompt:
        """Some of the rows, and of the columns where those of others are padding."""
        tokens, mask, positions = (x[rows, columns].copy() for x in (self.tokens, self.mask, self.positions))
        types = None if self.token_types is None else self.token_types[rows, columns].copy()
        return Prompt(
            self.name, tokens, mask, positions, types, None if self.dimensions is None else self.dimensions[rows].copy()
        )


def prompts(spec: ModelSpec, batch: int) -> tuple[Prompt, ...]:
    """In batches of at most `batch` rows."""
    longest = min(LONGEST, spec.max_positions)
    return (
        _prompt(spec, "one short row", [min(7, longest)], 1),
        _prompt(spec, "two long rows", [longest, longest], batch),
        _prompt(spec, "three rows, padded on the left", [min(length, longest) for length in (5, 31, 18)], batch),
        _far(spec),
    )


def windows(spec: ModelSpec) -> tuple[int, ...]:
    return tuple(sorted({mixer.window for mixer in spec.mixers if mixer.window is not None}))


def _prompt(spec: ModelSpec, name: str, lengths: list[int], batch: int) -> Prompt:
    width = max(lengths)
    mask = np.stack([np.arange(width) >= width - length for length in lengths[:batch]]).astype(np.int64)
    return _with_tokens(spec, name, mask, np.maximum(np.cumsum(mask, axis=1) - 1, 0), SEED + sum(lengths))


def _far(spec: ModelSpec) -> Prompt:
    """One row whose tokens stand far apart, up to the last position: the only one that meets most of a rope's angles.
    Where a window counts keys in one runtime and positions in another, they stand side by side at the end."""
    count, last = min(FAR, spec.max_positions), spec.max_positions - 1
    chosen = np.random.default_rng(SEED).choice(last, count - 1, replace=False) if last else np.empty(0, np.int64)
    positions = np.append(np.sort(chosen), last) if not windows(spec) else np.arange(last - count + 1, last + 1)
    return _with_tokens(spec, "far positions", np.ones((1, count), np.int64), positions[np.newaxis], SEED)


def _with_tokens(spec: ModelSpec, name: str, mask: Array, positions: Array, seed: int) -> Prompt:
    tokens = np.random.default_rng(seed).integers(0, spec.vocab_size, mask.shape, dtype=np.int64)
    return Prompt(name, tokens * mask, mask, positions.astype(np.int64))
