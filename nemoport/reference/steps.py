"""What one step of a decoder needs to know of the steps before it: where tokens stand, and their keys and values."""

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
    """The state of attention between steps: keys and values [batch, kv_heads, positions, head_dim] of each layer
    (and of each rank, where a layer has several)."""

    def __init__(self) -> None:
        self._state: dict[Hashable, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: Hashable, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append this step's; returns all of them."""
        if layer in self._state:
            past_keys, past_values = self._state[layer]
            keys, values = torch.cat([past_keys, keys], dim=2), torch.cat([past_values, values], dim=2)
        self._state[layer] = keys, values
        return keys, values
