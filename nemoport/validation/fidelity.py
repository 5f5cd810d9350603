"""What a quantization costs: the artifact's predictions on text beside those of the source, and how much is allowed.

The source is executed in float32, with its own weights. A quantizer that does what it should may still not suit a
model; a wrong one never does. The gates are absolute, since whoever serves the model wants to know what it costs and
not what rounding excuses; the source in bfloat16 stands beside it as the noise that nobody minds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nemoport.errors import UnsupportedInput
from nemoport.exporters.encoding import Encoding
from nemoport.validation.measures import Logits, log_softmax
from nemoport.validation.passages import Passages
from nemoport.validation.prompts import Prompt
from nemoport.validation.report import Check, Fidelity

Answers = Callable[[Prompt], Logits]


@dataclass(frozen=True, kw_only=True)
class Gate:
    """Upper bounds."""

    kl_mean: float
    perplexity: float
    """By what share it may be above the source's."""
    disagree: float | None = None
    """The share of positions with another likeliest token."""


GATES = {8: Gate(kl_mean=0.01, perplexity=0.01), 4: Gate(kl_mean=0.05, perplexity=0.05, disagree=0.1)}
"""By the bits of a weight, whatever the method and wherever it is written to."""


def gate(encoding: Encoding) -> Gate:
    if encoding.bits not in GATES:
        raise UnsupportedInput(f"{encoding.method} has weights of {encoding.bits} bits; {list(GATES)} bits are judged")
    return GATES[encoding.bits]


def fidelities(asked: tuple[Prompt, ...], source: Answers, others: tuple[Answers, ...]) -> tuple[Fidelity, ...]:
    """How each of the others predicts a text beside the source."""
    rows: list[list[NDArray[np.float64]]] = [[] for _ in others]
    for prompt in asked:
        wanted = log_softmax(source(prompt)[:, :-1].astype(np.float64))
        for answers, found in zip(others, rows, strict=True):
            found.append(_by_position(answers(prompt)[:, :-1], wanted, prompt.tokens[:, 1:]))
    return tuple(_fidelity(np.concatenate(found, axis=1)) for found in rows)


def checks(found: Fidelity, allowed: Gate, text: Passages) -> Iterator[Check]:
    """One for each bound."""
    where = f"on {text.tokens.rows.size} tokens, {text.source}"
    yield bounded(f"divergence {where}", found.kl_mean, allowed.kl_mean, f"KL {{}} (p99 {found.kl_p99:.1e})", ".1e")
    ratio = f"perplexity {found.perplexity:.3f}, {{}} beside the source's"
    yield bounded(f"perplexity {where}", found.ratio - 1, allowed.perplexity, ratio, "+.2%")
    if allowed.disagree is not None:
        other = "another likeliest token at {}"
        yield bounded(f"likeliest tokens {where}", 1 - found.top1, allowed.disagree, other, ".2%")


def bounded(name: str, found: float, bound: float, words: str, form: str) -> Check:
    """A measure below an upper bound, in words."""
    used = max(found, 0.0) / bound if np.isfinite(found) else float("inf")
    return Check(
        name=name,
        passed=used <= 1,
        found=words.format(format(found, form)),
        needed=f"at most {format(bound, form)}",
        used=used,
    )


def _by_position(found: Logits, wanted: NDArray[np.float64], following: NDArray[np.int64]) -> NDArray[np.float64]:
    """[measures, positions]: divergence from the source, agreement with it, and the surprise of each at the token that
    follows. What is no number is infinitely far."""
    logs = log_softmax(found.astype(np.float64))
    divergence = np.maximum(np.sum(np.exp(wanted) * (wanted - logs), axis=-1), 0.0)
    agree = (found.argmax(axis=-1) == wanted.argmax(axis=-1)).astype(np.float64)
    surprise, expected = (-np.take_along_axis(each, following[..., None], axis=-1)[..., 0] for each in (logs, wanted))
    measured = np.stack([divergence, agree, surprise, expected]).reshape(4, -1)
    measured[1, ~np.isfinite(measured[0])] = 0.0
    return np.where(np.isfinite(measured), measured, np.inf)


def _fidelity(measured: NDArray[np.float64]) -> Fidelity:
    divergence, agree, surprise, expected = measured
    with np.errstate(over="ignore", invalid="ignore"):
        return Fidelity(
            positions=len(divergence),
            kl_mean=float(divergence.mean()),
            kl_p99=float(np.quantile(divergence, 0.99, method="higher")),
            top1=float(agree.mean()),
            perplexity=float(np.exp(surprise.mean())),
            ratio=float(np.exp(surprise.mean() - expected.mean())),
        )
