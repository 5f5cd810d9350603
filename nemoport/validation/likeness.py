"""What a quantization costs a model that answers each text at once: its vectors beside those of the source, and who is
whose neighbour among them; or its labels, and in which order it puts texts. The gates are absolute, as `fidelity` has
it of models that write."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from nemoport.spec import Classifier, Embedding
from nemoport.validation.fidelity import Answers, bounded
from nemoport.validation.measures import Logits, log_softmax
from nemoport.validation.prompts import Prompt
from nemoport.validation.report import Check, Directions, Labels

Likeness = Directions | Labels
_Wide = NDArray[np.float64]

NEAREST = 10
TURNED, LOST = 0.005, 0.1
"""How far vectors may turn, one less the mean cosine, and the share of the ten nearest texts that may be others."""
DIVERGED, MOVED = 0.01, 0.05
"""The mean divergence of labels, and the share of pairs of texts that may change places."""


def likenesses(asked: tuple[Prompt, ...], head: Embedding | Classifier, *answers: Answers) -> tuple[Likeness, ...]:
    """How each of the others answers beside the first."""
    measure: Callable[[_Wide, _Wide], Likeness] = directions if isinstance(head, Embedding) else labels
    wanted, *found = (_all(asked, each) for each in answers)
    return tuple(measure(each, wanted) for each in found)


def directions(found: _Wide, wanted: _Wide) -> Directions:
    ours, theirs = _unit(found), _unit(wanted)
    cosine = np.where(np.isfinite(ours).all(axis=-1), np.sum(ours * theirs, axis=-1), -1.0)
    same = [len(a & b) / NEAREST for a, b in zip(_nearest(ours), _nearest(theirs), strict=True)]
    return Directions(
        texts=len(found),
        cosine_mean=float(cosine.mean()),
        cosine_min=float(cosine.min()),
        nearest=float(np.mean(same)),
    )


def labels(found: _Wide, wanted: _Wide) -> Labels:
    """One label is a score, whose probability is its sigmoid: beside it stands a label of 0."""
    finite: NDArray[np.bool_] = np.all(np.isfinite(found), axis=-1)
    clean = np.where(finite[:, None], found, 0.0)
    logs, exact = (log_softmax(np.pad(x, ((0, 0), (0, int(x.shape[1] == 1))))) for x in (clean, wanted))
    divergence = np.where(finite, np.maximum(np.sum(np.exp(exact) * (exact - logs), axis=-1), 0.0), np.inf)
    return Labels(
        texts=len(found),
        kl_mean=float(divergence.mean()),
        kl_max=float(divergence.max()),
        top1=float((logs.argmax(axis=-1) == exact.argmax(axis=-1)).mean()),
        moved=_moved(clean, wanted),
    )


def checks(found: Likeness, source: str) -> Iterator[Check]:
    """One for each bound."""
    where = f"on {found.texts} texts, {source}"
    match found:
        case Directions():
            also = f"mean cosine {found.cosine_mean:.4f}, least {found.cosine_min:.4f}, {{}} from 1"
            yield bounded(f"direction {where}", 1 - found.cosine_mean, TURNED, also, ".4f")
            others = f"{{}} of the {NEAREST} nearest texts are others"
            yield bounded(f"neighbours {where}", 1 - found.nearest, LOST, others, ".1%")
        case Labels():
            also = f"KL {{}} (at most {found.kl_max:.1e})"
            yield bounded(f"divergence {where}", found.kl_mean, DIVERGED, also, ".1e")
            yield bounded(f"order {where}", found.moved, MOVED, "{} of the pairs of texts change places", ".1%")


def _all(asked: tuple[Prompt, ...], answers: Answers) -> _Wide:
    found: list[Logits] = [answers(prompt) for prompt in asked]
    return np.concatenate(found).astype(np.float64)


def _unit(x: _Wide) -> _Wide:
    unit: _Wide = x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-300)
    return unit


def _nearest(x: _Wide) -> list[set[int]]:
    """Of each text, the others whose vectors lie nearest."""
    likeness = x @ x.T
    np.fill_diagonal(likeness, -np.inf)
    return [set(row[:NEAREST].tolist()) for row in np.argsort(-likeness, axis=-1, kind="stable")]


def _moved(found: _Wide, wanted: _Wide) -> float:
    """The share of pairs of texts that a label puts in another order; equal ones in none."""
    ours, theirs = (np.sign(x[:, None] - x[None]) for x in (found, wanted))
    told = theirs != 0
    return float((ours != theirs)[told].mean()) if told.any() else 0.0
