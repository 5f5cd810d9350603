"""How requests reach a session. A scheduler is a function from arrays to arrays; this one hands them straight on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from threading import BoundedSemaphore

from nemoport.runner.backends import Session
from nemoport.runner.tensors import Array

Execute = Callable[[Mapping[str, Array], Sequence[str]], list[Array]]


def direct(session: Session, count: int) -> Execute:
    """One request, one execution, in the thread that brought it; `count` of them at a time."""
    slots = BoundedSemaphore(count)

    def execute(feeds: Mapping[str, Array], wanted: Sequence[str]) -> list[Array]:
        with slots:
            return session.execute(feeds, wanted)

    return execute
