"""The reference, a step at a time for several sequences: prefill one, step many, join and keep rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nemoport.reference.steps import PADDING, Cache, Places


@dataclass(frozen=True)
class Rows:
    """The state of some sequences. They end at the same position of the cache; `seen` counts those of each."""

    cache: Cache
    seen: tuple[int, ...]

    @property
    def width(self) -> int:
        return max(self.seen)


class ReferenceExecutor:
    """`runs` is a whole model or its ranks, with a spec."""

    def __init__(self, runs: Any) -> None:
        self._runs = runs
        spec = runs.spec
        self.vocab_size: int = spec.vocab_size
        self.max_positions: int = spec.max_positions
        self.position_bytes: int = self.prefill([0], None)[1].cache.nbytes  # and all weights have been read once

    def prefill(self, tokens: Sequence[int], state: Rows | None) -> tuple[NDArray[np.float32], Rows]:
        logits, after = self._run([list(tokens)], state or Rows(Cache(), (0,)))
        return logits[0], after

    def step(self, tokens: Sequence[int], state: Rows) -> tuple[NDArray[np.float32], Rows]:
        return self._run([[token] for token in tokens], state)

    def joined(self, states: Sequence[Rows]) -> Rows:
        width = max(state.width for state in states)
        cache = Cache.joined([state.cache for state in states], width)
        return Rows(cache, tuple(seen for state in states for seen in state.seen))

    def kept(self, state: Rows, rows: Sequence[int]) -> Rows:
        seen = tuple(state.seen[row] for row in rows)
        return Rows(state.cache.kept(rows, max(seen)), seen)

    @torch.inference_mode()
    def _run(self, tokens: list[list[int]], before: Rows) -> tuple[NDArray[np.float32], Rows]:
        """Logits [rows, vocabulary] after the last of the tokens [rows, length]; the cache of `before` goes with it."""
        ids = torch.tensor(tokens, device=self._runs.device)
        hidden = self._runs.hidden(ids, _places(before, ids), before.cache)
        logits: NDArray[np.float32] = self._runs.logits(hidden[..., -1:, :])[:, 0].cpu().numpy()
        return logits, Rows(before.cache, tuple(seen + ids.shape[1] for seen in before.seen))


def _places(before: Rows, ids: Tensor) -> Places:
    seen = torch.tensor(before.seen, device=ids.device)[:, None]
    queries = seen + torch.arange(ids.shape[1], device=ids.device)
    past = torch.arange(before.width, device=ids.device) - before.width + seen
    return Places(queries, torch.cat([past.masked_fill(past < 0, PADDING), queries], dim=1))
