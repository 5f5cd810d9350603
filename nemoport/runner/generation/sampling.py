"""Which token comes next, from the logits of one position: the same for the same seed, whoever else is in the batch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Sampling:
    """Logits are divided by `temperature`, the `top_k` likeliest are kept (0: all), of those the fewest whose shares
    reach `top_p` (arXiv:1904.09751), and one is drawn by its share. Temperature 0 takes the likeliest."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1 or self.top_p == 0

    def numbered(self, choice: int) -> Sampling:
        """For one of several texts from the same prompt."""
        return replace(self, seed=(self.seed + choice) % 2**64)


def choose(logits: Logits, sampling: Sampling, step: int) -> int:
    """The token for the place `step` of a continuation, from logits [vocabulary]."""
    if sampling.greedy:
        return int(logits.argmax())
    order = _likeliest(logits, sampling.top_k)
    scores = logits[order].astype(np.float64)
    with np.errstate(over="ignore"):
        shares = np.exp((scores - scores[0]) / sampling.temperature)
    reached = np.cumsum(shares / shares.sum())
    kept = int(np.searchsorted(reached, min(sampling.top_p, reached[-1]))) + 1
    at = np.searchsorted(reached[:kept], _chance(sampling.seed, step) * reached[kept - 1], side="right")
    return int(order[min(int(at), kept - 1)])


def _likeliest(logits: Logits, count: int) -> NDArray[np.int64]:
    """Tokens by falling logit, equals by number; `count` of them, 0 for all."""
    if not 0 < count < len(logits):
        return np.argsort(-logits, kind="stable")
    edge = np.partition(logits, -count)[-count]
    above = np.flatnonzero(logits >= edge)
    return above[np.argsort(-logits[above], kind="stable")][:count]


def _chance(seed: int, step: int) -> float:
    """Within [0, 1): a number of its own for each place of each seed (Philox is a function of key and counter), so
    that nothing need be kept between steps."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=step)).random())
