"""Whether a runtime loads what a conversion writes: foreseen from the target and the method before anything is read,
and judged again from what the target says of this very model before anything is written."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

from nemoport import plugins
from nemoport.compatibility import Outcome, Runtime, Verdict, judge, least_triton
from nemoport.errors import NemoportError, UsageError
from nemoport.exporters import quantize, serving
from nemoport.exporters.convert import TARGETS
from nemoport.exporters.job import Job
from nemoport.exporters.methods import ENGINES
from nemoport.spec import Plan

STEPS = ("tokenizer",)
"""Targets that are part of a model only, and so never another way to write one."""


def foresee(to: str, plan: Plan, calibrated: bool, runtime: Runtime) -> Verdict:
    """Refuse what no model of this target and method could be loaded by."""
    return _accepted(to, _loads(to, plan, calibrated), plan, calibrated, runtime)


def check(job: Job, runtime: Runtime) -> Verdict:
    """Refuse a planned conversion whose result would not be loaded."""
    return _accepted(job.kind, job.output.loads, job.plan, job.calibration is not None, runtime)


def _accepted(to: str, loads: tuple[str, ...], plan: Plan, calibrated: bool, runtime: Runtime) -> Verdict:
    verdict = judge(to, loads, runtime)
    if verdict.refused:
        method = f" --quantize {plan.recipe.method}" if plan.recipe else ""
        said = filter(None, (_later(to, loads, runtime), _instead(to, plan, calibrated, runtime)))
        way_out = "; ".join(said) or verdict.first or "name another --runtime, or leave it out"
        raise UsageError(f"what --to {to}{method} writes {verdict}; {way_out}")
    return verdict


def _later(to: str, loads: tuple[str, ...], runtime: Runtime) -> str:
    """A later release of Triton, where that is all it needs."""
    oldest = least_triton(to, loads, runtime.release) if runtime.release else None
    return f"Triton {oldest} is the oldest that loads it" if oldest and oldest > runtime.release else ""


def _instead(to: str, plan: Plan, calibrated: bool, runtime: Runtime) -> str:
    """The targets that are loaded there."""
    others = [f"--to {other}" for other in sorted(_others(to, plan, calibrated, runtime))]
    known = " or ".join(filter(None, (", ".join(others[:-1]), *others[-1:])))
    return f"{known} is loaded there{' with that method' if plan.recipe else ''}" if known else ""


def _others(to: str, plan: Plan, calibrated: bool, runtime: Runtime) -> Iterator[str]:
    """The targets that work; those that need something first only where no other does."""
    found: dict[str, Outcome] = {}
    for other in plugins.names(TARGETS):
        if other not in (to, *STEPS):
            try:
                found[other] = judge(other, _loads(other, plan, calibrated), runtime).outcome
            except NemoportError:
                continue  # the method is not written there
    best = min(found.values(), default=Outcome.REFUSED)
    yield from (other for other, outcome in found.items() if outcome is best and best <= Outcome.NEEDS)


def _loads(to: str, plan: Plan, calibrated: bool) -> tuple[str, ...]:
    target: ModuleType = plugins.load(TARGETS, to)
    if plan.recipe is None:
        declared: tuple[str, ...] = target.LOADS
        return declared
    chosen = quantize.chosen(plan.recipe, to, target, calibrated, plan.dialect)
    loads = chosen.encoding.loads[chosen.dialect]
    return serving.of_engine(loads, to) if to in ENGINES else loads
