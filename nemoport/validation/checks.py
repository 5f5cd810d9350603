"""The checks and their gates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from nemoport.errors import CheckFailed, InputError
from nemoport.exporters.checkpoint import Model
from nemoport.spec import ModelSpec, tensors
from nemoport.validation.executions import Execution
from nemoport.validation.measures import NOWHERE, Distance, Logits, distance
from nemoport.validation.prompts import Prompt
from nemoport.validation.report import Check
from nemoport.validation.texts import alone
from nemoport.validation.weights import differences, missing, unequal

STEPS = 6
"""Tokens fed one at a time, after the others at once."""


@dataclass(frozen=True, kw_only=True)
class Gate:
    """Upper bounds of a distance."""

    relative: float
    worst: float
    kl_mean: float

    def used(self, found: Distance) -> float:
        """The largest share of a bound that was used up; over 1, the gate is shut."""
        if not found.finite:
            return float("inf")
        return max(found.relative / self.relative, found.worst / self.worst, found.kl_mean / self.kl_mean)


FLOAT32 = Gate(relative=1e-5, worst=2e-5, kl_mean=1e-7)
"""float32 against float32: what another order of summation may make of it."""
OVER_FLOOR = Gate(relative=1.5, worst=2.0, kl_mean=2.0)
"""In 16 bits, or where the runtime rounds what enters linears, no worse than this many times what the source itself
loses so (an absolute bound would judge the rounding and not the export), and no better than float32 can be."""
OF_FEW = Gate(relative=5.0, worst=5.0, kl_mean=25.0)
ENOUGH = 256
"""The same of an answer of so few numbers, a reranker's scores for example, that two draws of the same noise differ by
several times: of 3 numbers and 12, the root of their F statistic is over 3 once in a thousand."""
TOO_NOISY = 0.2
"""A relative noise floor that no longer tells a right model from a wrong one."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What the source answers to a prompt, and what it loses when computed as the artifact is: in its dtype, with the
    inputs of linears rounded as there (None: in float32, with none)."""

    logits: Logits
    floor: Distance | None = None
    farthest: Distance | None = None
    """What it loses so at worst, in any prompt, where one prompt does not tell: at the worst position where a router
    chooses, since of two experts that the dtype cannot tell apart the artifact may take the other, at another position
    than the source did; of the worst prompt where inputs are rounded, of which a short one has few; of the worst batch
    of texts where each has one answer, of numbers too few to tell noise by."""

    @property
    def gate(self) -> Gate:
        if (floor := self.farthest or self.floor) is None:
            return FLOAT32
        over = OF_FEW if self.logits.ndim == 2 and self.logits.size < ENOUGH else OVER_FLOOR
        return Gate(
            relative=max(FLOAT32.relative, over.relative * floor.relative),
            worst=max(FLOAT32.worst, over.worst * floor.worst),
            kl_mean=max(FLOAT32.kl_mean, over.kl_mean * floor.kl_mean),
        )


def same_model(spec: ModelSpec, source: ModelSpec) -> Check:
    """Whether the two can be compared at all."""
    ours, theirs = tensors(spec), tensors(source)
    differ = [name for name in {**theirs, **ours} if ours.get(name) != theirs.get(name)]
    found = f"{len(ours)} tensors"
    if differ:
        name = differ[0]
        here, there = (f"{list(each[name].shape)}" if name in each else "none" for each in (ours, theirs))
        found = f"{name} is {here}, in the source {there} ({len(differ)} such tensors)"
    return Check(name="model of the source", passed=not differ, found=found, needed="the same tensors, shapes")


SOURCE, RECIPE = "the source", "the recipe"
"""What an artifact must be equal to: the source, or what its recipe makes of that."""


def weights(model: Model, execution: Execution, of: str) -> Check:
    lost = missing(model, execution.holds) if execution.folded else ()
    wrong = unequal(model, execution.holds) if execution.folded else differences(model, execution.holds)
    found = f"{wrong[0]} ({len(wrong)} such tensors)" if wrong else f"{len(execution.holds)} tensors equal"
    found += f", {len(lost)} folded into others, which only the {execution.gives} judge" if lost else ""
    return Check(name=f"weights of {of}", passed=not wrong, found=found, needed="every bit, in the dtype held")


def answers(execution: Execution, expected: Mapping[Prompt, Expected], of: str) -> Iterator[Check]:
    """Every prompt, asked in several ways. The first request that is refused ends it."""
    try:
        for prompt, wanted in expected.items():
            yield from _answers(execution, prompt, wanted, of)
    except (CheckFailed, InputError) as error:
        yield Check(name="every prompt is answered", passed=False, found=str(error), needed="logits")


def _answers(execution: Execution, prompt: Prompt, wanted: Expected, of: str) -> Iterator[Check]:
    if wanted.floor and not wanted.floor.relative <= TOO_NOISY:
        yield Check(
            name=f"the source itself in {execution.computes_in}: {prompt.name}",
            passed=False,
            found=f"relative {wanted.floor.relative:.1e}; the model does not fit this dtype, convert with another",
            needed=f"relative {TOO_NOISY}",
            distance=wanted.floor,
        )
        return
    answer = execution.logits(prompt)
    yield _compared(f"{execution.gives} of {of}", prompt, answer, wanted.logits, wanted.gate)
    if len(prompt.tokens) > 1:
        turned = execution.logits(prompt.turned)[::-1]
        yield _compared("rows in another order", prompt, turned, answer, wanted.gate)
    if answer.ndim == 2 and not prompt.real.all():
        each = np.concatenate([execution.logits(text) for text in alone(prompt)])
        yield _compared("each text alone", prompt, each, answer, wanted.gate)
    if execution.decode and prompt.tokens.shape[1] > 1:
        steps = min(STEPS, prompt.tokens.shape[1] - 1)
        yield _compared("token by token", prompt, execution.decode(prompt, steps), answer, wanted.gate)


def counted(prompt: Prompt, answer: Logits) -> Logits:
    """What is compared: of logits for each token, not those at padding; of one answer for each text, all."""
    return answer[prompt.real] if answer.ndim == 3 else answer


def _compared(what: str, prompt: Prompt, found: Logits, wanted: Logits, gate: Gate) -> Check:
    same = found.shape == wanted.shape
    apart = distance(counted(prompt, found), counted(prompt, wanted)) if same else NOWHERE
    used = gate.used(apart)
    also = f"KL {apart.kl_mean:.1e}, top-1 {apart.top1:.3f}"
    if wanted.ndim == 2:
        also = f"cosine from {apart.cosine:.7f}, by at most {apart.max_abs:.1e}"
    return Check(
        name=f"{what}: {prompt.name}",
        passed=used <= 1,
        found=f"relative {apart.relative:.1e}, worst {apart.worst:.1e}, {also}",
        needed=f"relative {gate.relative:.1e}, worst {gate.worst:.1e}, KL {gate.kl_mean:.1e}",
        distance=apart,
        used=used,
    )
