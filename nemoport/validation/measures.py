"""How far two sets of logits lie apart. All of float32 [..., vocabulary], computed in float64."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]
_Wide = NDArray[np.float64]

_BLOCK = 1 << 22
"""Logits compared at a time: float64 copies of a large vocabulary at every position would be gigabytes."""


@dataclass(frozen=True, kw_only=True)
class Distance:
    relative: float
    """||found - wanted|| / ||wanted||: what a wrong model moves."""
    worst: float
    """max |found - wanted| / max |wanted|: what a few wrong rows move, which the norm of all would hide."""
    max_abs: float
    cosine: float
    """The least over all positions."""
    kl_mean: float
    """Kullback-Leibler divergence of the found distribution from the wanted one, nats."""
    kl_max: float
    top1: float
    """Share of positions with the same likeliest token. For people: no gate, since `worst` bounds how far apart two
    tokens can lie that change places."""

    @property
    def finite(self) -> bool:
        return bool(np.isfinite([self.relative, self.worst, self.kl_mean]).all())


NOWHERE = Distance(relative=np.inf, worst=np.inf, max_abs=np.inf, cosine=-1.0, kl_mean=np.inf, kl_max=np.inf, top1=0.0)
"""Of answers that cannot be compared: another shape, none at all, or numbers that are no numbers."""


def distance(found: Logits, wanted: Logits) -> Distance:
    if found.shape != wanted.shape or not found.size or not (np.isfinite(found).all() and np.isfinite(wanted).all()):
        return NOWHERE
    a, b = found.reshape(-1, found.shape[-1]), wanted.reshape(-1, wanted.shape[-1])
    step = max(1, _BLOCK // a.shape[-1])
    blocks = [_by_position(a[i : i + step], b[i : i + step]) for i in range(0, len(a), step)]
    gap, gap_squared, size, size_squared, cosine, divergence, agree = np.concatenate(blocks, axis=1)
    return Distance(
        relative=float(np.sqrt(_over(gap_squared.sum(), size_squared.sum()))),
        worst=_over(gap.max(), size.max()),
        max_abs=float(gap.max()),
        cosine=float(cosine.min()),
        kl_mean=float(divergence.mean()),
        kl_max=float(divergence.max()),
        top1=float(agree.mean()),
    )


def farthest(found: Iterable[Distance]) -> Distance:
    """The worst of each measure."""
    each = list(found)
    least = {"cosine", "top1"}
    names = [field.name for field in fields(Distance)]
    return Distance(**{name: (min if name in least else max)(getattr(one, name) for one in each) for name in names})


def each_position(found: Logits, wanted: Logits) -> list[Distance]:
    """The distances of single positions."""
    a, b = found.reshape(-1, found.shape[-1]), wanted.reshape(-1, wanted.shape[-1])
    return [distance(one[None], other[None]) for one, other in zip(a, b, strict=True)]


def _by_position(found: Logits, wanted: Logits) -> _Wide:
    """[measures, positions]."""
    a, b = found.astype(np.float64), wanted.astype(np.float64)
    gap = np.abs(a - b)
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    cosine = np.where(lengths > 0, np.sum(a * b, axis=-1) / np.maximum(lengths, 1e-300), ~gap.any(axis=-1))
    log_a, log_b = log_softmax(a), log_softmax(b)
    divergence = np.maximum(np.sum(np.exp(log_b) * (log_b - log_a), axis=-1), 0.0)
    agree = a.argmax(axis=-1) == b.argmax(axis=-1)
    sizes = (np.abs(b).max(axis=-1), np.square(b).sum(axis=-1))
    return np.stack([gap.max(axis=-1), np.square(gap).sum(axis=-1), *sizes, cosine, divergence, agree])


def _over(part: float, whole: float) -> float:
    return float(part / whole) if whole else float("inf") if part else 0.0


def log_softmax(x: _Wide) -> _Wide:
    shifted = x - x.max(axis=-1, keepdims=True)
    logs: _Wide = shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))
    return logs
