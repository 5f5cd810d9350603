"""What one step of a decoder needs to know of the steps before it: where tokens stand, and what mixers kept."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

PADDING = 1 << 40
"""The position of padding among the keys: after every query, hence seen by none."""


@dataclass(frozen=True)
class Places:
    """Positions count real tokens only, so a padded row is computed as it would be alone."""

    queries: Tensor
    """[batch, length]: positions of the tokens of this step."""
    keys: Tensor
    """[batch, past + length]: positions of these and of all tokens before, PADDING where there is none."""

    @property
    def real(self) -> Tensor:
        """[batch, length]: which tokens of this step are no padding."""
        return self.keys[:, -self.queries.shape[1] :] != PADDING

    def visible(self, window: int | None, causal: bool = True) -> Tensor:
        """[batch, length, past + length]: whether a query sees a key."""
        if not causal:
            assert window is None, "a window looks back"
            return (self.keys != PADDING)[:, None, :].expand(-1, self.queries.shape[1], -1)
        distance = self.queries[:, :, None] - self.keys[:, None, :]
        return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def places(mask: Tensor, past: Places | None = None) -> Places:
    """`mask` [batch, length] is true at the real tokens of this step."""
    seen = 0 if past is None else (past.keys != PADDING).sum(1, keepdim=True)
    positions = (mask.cumsum(1) - 1 + seen).clamp(min=0)
    keys = positions.masked_fill(~mask, PADDING)
    return Places(positions, keys if past is None else torch.cat([past.keys, keys], dim=1))


class Cache:
    """The state of mixers between steps, the tensors that each declares, of each layer (and of each rank, where a layer
    has several)."""

    def __init__(self) -> None:
        self.states: dict[Hashable, tuple[Tensor, ...]] = {}
        self.growing: set[Hashable] = set()
        """The layers whose state has an axis of positions, the third; the others' is replaced at each step."""

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for parts in self.states.values() for part in parts)

    def kept(self, rows: Sequence[int], width: int) -> Cache:
        """Some rows of the batch, and of their positions the last `width`."""
        kept = Cache()
        kept.growing = set(self.growing)
        for layer, parts in self.states.items():
            chosen = tuple(part[list(rows)] for part in parts)
            grows = layer in self.growing
            kept.states[layer] = tuple(part[:, :, part.shape[2] - width :] for part in chosen) if grows else chosen
        return kept

    @staticmethod
    def joined(caches: Sequence[Cache], width: int) -> Cache:
        """The rows of all in one batch, each ending at the last of its `width` positions."""
        joined = Cache()
        joined.growing = set(caches[0].growing)
        for layer in caches[0].states:
            states = zip(*(cache.states[layer] for cache in caches), strict=True)
            join = partial(_rows, width=width) if layer in joined.growing else torch.cat
            joined.states[layer] = tuple(map(join, states))
        return joined


@dataclass(frozen=True)
class Memory:
    """One layer's place in a cache. Without a cache, a step is all there is."""

    cache: Cache | None
    layer: Hashable

    def past(self) -> tuple[Tensor, ...] | None:
        return self.cache.states.get(self.layer) if self.cache else None

    def keep(self, *state: Tensor) -> None:
        if self.cache:
            self.cache.states[self.layer] = state

    def extend(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Append this step's [batch, heads, positions, size]; returns all of them."""
        past = self.past()
        state = new if past is None else tuple(map(_after, past, new))
        self.keep(*state)
        if self.cache:
            self.cache.growing.add(self.layer)
        return state


def _after(past: Tensor, new: Tensor) -> Tensor:
    return torch.cat([past, new], dim=2)


def _rows(states: Sequence[Tensor], width: int) -> Tensor:
    """Several batches in one; positions that are missing come first, as zeros."""
    return torch.cat([torch.nn.functional.pad(state, (0, 0, width - state.shape[2], 0)) for state in states])
