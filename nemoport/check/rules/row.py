"""A rule, as a row of a table."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from nemoport.check.finding import Problem, Severity

S = TypeVar("S")
MANY = 200
"""Names among which a near one is looked for; the search takes as long as they are many."""


@dataclass(frozen=True)
class Rule(Generic[S]):
    """For subjects of one type: a model in its repository, or an artifact."""

    code: str
    severity: Severity
    sentence: str
    """What must hold."""
    look: Callable[[S], Iterable[Problem]]


def nearest(word: str, known: Collection[str]) -> str | None:
    """The name that was meant, if one is near."""
    by_small_letters = {each.lower(): each for each in sorted(known, reverse=True)}
    if word.lower() in by_small_letters:
        return by_small_letters[word.lower()]
    if len(by_small_letters) > MANY:
        return None
    found = difflib.get_close_matches(word.lower(), by_small_letters, n=1, cutoff=0.7)
    return by_small_letters[found[0]] if found else None


def did_you_mean(word: str, known: Collection[str], otherwise: str) -> str:
    near = nearest(word, known)
    return f"write {near}" if near else otherwise


def some(words: Iterable[str], limit: int = 8) -> str:
    """A list for a sentence, cut where it would be long."""
    found = list(words)
    shown = ", ".join(found[:limit]) or "none"
    return f"{shown} and {len(found) - limit} more" if len(found) > limit else shown
