"""The runtime that is meant to load what is built: engines load in the release that built them, on that kind of GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from nemoport.artifact import Artifact
from nemoport.compatibility import Held, Runtime, judge
from nemoport.compilers import machine
from nemoport.compilers.build import Build, Fact
from nemoport.errors import UnsupportedInput, UsageError

BOUND = ("tensorrt", "tensorrt_llm")
"""Engines that load what their own release built."""


def place(made: Artifact, source: Path, to: str, runtime: Runtime) -> Held:
    """Where it will be loaded, refused where nothing that is there loads what comes of the source."""
    verdict = judge(made.kind, made.loads, runtime)
    if verdict.refused:
        way_out = verdict.first or "name another --runtime, or convert to what that one loads"
        raise UsageError(f"{source}, which --to {to} would compile, {verdict}; {way_out}")
    return next(each for each in runtime.places if each.word == verdict.place)


def narrowed(build: Build, place: Held, runtime: Runtime, *, chosen: bool) -> Build:
    """The same build on the GPU that is meant; and where what it builds is of one release, by that of the place, in its
    container unless another was `chosen`."""
    facts = tuple(_narrowed(fact, place, runtime) for fact in build.facts)
    bound = [fact for fact in facts if fact.name in BOUND and place.engines.get(fact.name)]
    others = (_other(fact, machine.version(fact.name)) for fact in bound)
    container = place.image if bound and not chosen and place.image else build.container
    return replace(build, facts=facts, container=container, lacking=build.lacking or next(filter(None, others), None))


def check(finished: Artifact, product: Path, runtime: Runtime) -> None:
    """Refuse what was built by a release that the runtime does not load."""
    verdict = judge(finished.kind, finished.loads, runtime)
    if verdict.refused:
        raise UnsupportedInput(f"{product} {verdict}; build it where {runtime} is, or name another --runtime")


def _narrowed(fact: Fact, place: Held, runtime: Runtime) -> Fact:
    if fact.name in BOUND and (here := place.engines.get(fact.name)):
        where = f"run this in {place.image}" if place.image else f"run this where {place} is"
        return replace(fact, accepted=(str(here), f"{here}.*"), way_out=f"{place} loads what {here} built: {where}")
    if fact.name == "sm" and runtime.sm is not None:
        return replace(fact, accepted=(str(runtime.sm),), way_out=f"run this on the GPU that is meant, {runtime}")
    return fact


def _other(fact: Fact, installed: str | None) -> str | None:
    if installed is None or machine.accepts(fact, installed):
        return None
    return f"its {fact.name} is {installed}, and {fact.way_out}"
