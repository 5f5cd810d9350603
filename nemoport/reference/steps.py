"""What one step of a decoder needs to know of the steps before it: where tokens stand, and what mixers kept."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

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

    def visible(self, window: int | None) -> Tensor:
        """[batch, length, past + length]: whether a query sees a key."""
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
        return state


def _after(past: Tensor, new: Tensor) -> Tensor:
    return torch.cat([past, new], dim=2)
