"""An artifact and a runtime: it loads, it needs something first, it is refused, or no source says.

The kind says by which ways an artifact gets to engines, its `loads` which releases of them and which GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from nemoport.compatibility.loads import NAMES, Claim, claims
from nemoport.compatibility.rows import KINDS, NO_WAYS, PLACES, TRITON, WAYS, Place, Way
from nemoport.compatibility.runtimes import Held, Runtime, triton
from nemoport.compatibility.versions import Version, version


class Outcome(IntEnum):
    """The best first."""

    LOADS = 0
    NEEDS = 1
    UNKNOWN = 2
    REFUSED = 3


@dataclass(frozen=True, kw_only=True)
class Verdict:
    outcome: Outcome
    place: str
    """Which of the runtime's places it is about: the container that loads it."""
    reason: str
    """In a clause: what the place has, and what is wanted."""
    first: str = ""
    """What is done before it loads, or in place of it; empty where nothing is."""
    far: bool = False
    """The place lacks the engine altogether, so others have more to say."""

    @property
    def refused(self) -> bool:
        return self.outcome is Outcome.REFUSED

    def as_json(self) -> dict[str, str]:
        return {"outcome": self.outcome.name.lower(), "place": self.place, "reason": self.reason, "first": self.first}

    def __str__(self) -> str:
        match self.outcome:
            case Outcome.LOADS:
                return f"loads in {self.place}: {self.reason}"
            case Outcome.NEEDS:
                return f"loads in {self.place} ({self.reason}) once this is done: {self.first}"
            case Outcome.UNKNOWN:
                return f"not known for {self.place}: {self.reason}"
            case Outcome.REFUSED:
                return f"does not load in {self.place}: {self.reason}"


def judge(kind: str, loads: Sequence[str], runtime: Runtime) -> Verdict:
    """The best of what its places say."""
    said = claims(loads)
    return min((_at(kind, said, loads, place, runtime.sm) for place in runtime.places), key=_rank)


def instead(kind: str, place: Place) -> str:
    """What is done with a kind of artifact that a place does not take as it is. Empty where it does, and where no row
    speaks of it."""
    told = [*((way.kind, way.place, way.first) for way in WAYS), *((no.kind, no.place, no.instead) for no in NO_WAYS)]
    return next((what for *which, what in told if which == [kind, place]), "")


def least_triton(kind: str, loads: Sequence[str], oldest: str) -> str | None:
    """The oldest release of Triton, not older than `oldest`, that takes it as far as is known."""
    for row in reversed(TRITON):
        if row.release >= oldest and not judge(kind, loads, triton(row.release)).refused:
            return row.release
    return None


def newest_triton(kind: str, loads: Sequence[str]) -> str | None:
    """The newest container that takes it, as it is pulled."""
    for row in TRITON:
        if (verdict := judge(kind, loads, runtime := triton(row.release))).outcome <= Outcome.NEEDS:
            return next(place.image for place in runtime.places if place.word == verdict.place)
    return None


def contradiction(loads: Sequence[str], built_with: Mapping[str, str | int]) -> str | None:
    """What a stamp says against itself: built with one release, loaded by another."""
    for engine, built in built_with.items():
        said = [each for each in claims(loads) if each.engine == engine]
        with_version = version(str(built)) if engine in NAMES else None
        if with_version and said and not any(each.has(with_version) for each in said):
            return f"it was built with {NAMES[engine][0]} {built} and says that {_list(said)} loads it"
    sms = [each for each in claims(loads) if each.sm]
    if isinstance(sm := built_with.get("sm"), int) and sms and not any(each.runs_on(sm) for each in sms):
        return f"it was built for SM {sm} and says that {_list(sms)} loads it"
    return None


def misfit(
    kind: str,
    loads: Sequence[str],
    built_with: Mapping[str, str | int],
    engines: Mapping[str, Version | None],
    sms: Sequence[int],
) -> str | None:
    """Why a machine with these engines and GPUs does not load what was stamped so, as Triton would. Of an engine that
    is not there nothing is said, unless the artifact was built with it."""
    said = claims(loads)
    for engine in (way.engine for way in WAYS if (way.kind, way.place) == (kind, "triton")):
        here = engines.get(engine)
        own = [each for each in said if each.engine == engine]
        if here and own and not any(each.has(here) for each in own):
            return f"{_list(own)} loads it, and this machine has {NAMES[engine][0]} {here}"
    for engine in (name for name in built_with if name in NAMES):
        if engines.get(engine) is None:
            return f"it was built with {NAMES[engine][0]} {built_with[engine]}, and this machine has none"
    bound = [each for each in said if each.sm]
    if bound and not any(each.runs_on(sm) for each in bound for sm in sms):
        found = f"has SM {', '.join(map(str, sms))}" if sms else "has no GPU that can be asked"
        return f"{_list(bound)} loads it, and this machine {found}"
    return None


def _at(kind: str, said: tuple[Claim, ...], loads: Sequence[str], place: Held, sm: int | None) -> Verdict:
    if kind not in KINDS:
        reason = f"no row speaks of artifacts of kind {kind}"
        return Verdict(outcome=Outcome.UNKNOWN, place=place.word, reason=reason)
    if sm is not None and place.least_sm is not None and sm < place.least_sm:
        reason = f"it runs on GPUs of SM {place.least_sm} or later, and SM {sm} is meant"
        return Verdict(outcome=Outcome.REFUSED, place=place.word, reason=reason)
    found = list(_by_ways(kind, said, loads, place, sm))
    if not found:
        reason = f"{PLACES[place.place]} takes no artifact of kind {kind}"
        return Verdict(outcome=Outcome.REFUSED, place=place.word, reason=reason, first=instead(kind, place.place))
    return min(found, key=_rank)


def _by_ways(
    kind: str, said: tuple[Claim, ...], loads: Sequence[str], place: Held, sm: int | None
) -> Iterator[Verdict]:
    for way in WAYS:
        if (way.kind, way.place) == (kind, place.place):
            outcome, reason = _by(way, said, loads, place, sm)
            done_first = way.first if outcome is Outcome.LOADS else ""
            yield Verdict(
                outcome=Outcome.NEEDS if done_first else outcome,
                place=place.word,
                reason=reason,
                first=done_first,
                far=way.engine not in place.engines,
            )


def _by(way: Way, said: tuple[Claim, ...], loads: Sequence[str], place: Held, sm: int | None) -> tuple[Outcome, str]:
    name = NAMES[way.engine][0]
    if way.engine not in place.engines:
        return Outcome.REFUSED, f"it has no {name}"
    own = [each for each in said if each.engine in (way.engine, "triton")]
    if not own:
        return Outcome.REFUSED, f"what loads it is {'; '.join(loads)}, and not {name}"
    here = place.engines[way.engine]
    if sm is not None and not any(each.runs_on(sm) for each in own):
        return Outcome.REFUSED, f"{_list(own)} loads it, and SM {sm} is meant"
    if here is None and all(each.bounded for each in own):
        return Outcome.UNKNOWN, f"{_list(own)} loads it, and which it has was seen in no source"
    if here is None:
        return Outcome.LOADS, f"it has {name}"
    if any(each.has(here) or each.engine != way.engine for each in own):
        return Outcome.LOADS, f"it has {name} {here}"
    return Outcome.REFUSED, f"{_list(own)} loads it, and it has {name} {here}"


def _rank(verdict: Verdict) -> tuple[Outcome, bool]:
    return verdict.outcome, verdict.far


def _list(said: Sequence[Claim]) -> str:
    return " or ".join(dict.fromkeys(map(str, said)))
