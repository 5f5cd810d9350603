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
    """The state of mixers between steps, tensors [batch, heads, positions, size] of each layer (and of each rank, where
    a layer has several)."""

    def __init__(self) -> None:
        self._state: dict[Hashable, tuple[Tensor, ...]] = {}

    def extend(self, layer: Hashable, *new: Tensor) -> tuple[Tensor, ...]:
        """Append this step's; returns all of them."""
        past = self._state.get(layer)
        self._state[layer] = new if past is None else tuple(map(_after, past, new))
        return self._state[layer]


def _after(past: Tensor, new: Tensor) -> Tensor:
    return torch.cat([past, new], dim=2)
