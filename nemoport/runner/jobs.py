"""A request on its way through a model: accepted, waiting, executed, answered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from nemoport.runner.refusal import Refusal
from nemoport.runner.request import InferRequest
from nemoport.runner.tensors import Array

Reply = Mapping[str, Array] | Refusal
"""The wanted outputs by name, in the model's shapes, or why there are none."""
Deliver = Callable[[Reply | None, bool], None]
"""Called with each reply and whether it is the last; a decoupled model may end with None, or answer many times."""
WhenIdle = Callable[[Callable[[], None]], object]
"""Of a thread that reads requests: it will call this, once, when it has nothing more to read."""
_LARGEST = 2**64


@dataclass(eq=False, slots=True)
class Job:
    """`items` is the rows of its batch, 1 where the model does not batch. Times are of `time.monotonic_ns`."""

    request: InferRequest
    feeds: Mapping[str, Array]
    wanted: tuple[str, ...]
    items: int
    deliver: Deliver
    priority: int = 0
    timeout_us: int = 0
    queued: int = 0
    deadline: int | None = None
    whole: Job | None = field(default=None, init=False)
    """The ensemble's, where this is a step of it: cancelled with it."""
    kind: tuple[Any, ...] = field(init=False)
    """Jobs of one kind can be executed as one batch."""
    _cancelled: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.kind = tuple(sorted([(name, array.shape[1:]) for name, array in self.feeds.items()]))

    def cancel(self) -> None:
        """It is not executed if it still waits; a python model under way can see that nobody listens."""
        self._cancelled = True

    @property
    def cancelled(self) -> bool:
        return self._cancelled or (self.whole is not None and self.whole.cancelled)


class Later(Enum):
    """In place of a reply: the model goes on with the job, and at its end answers and counts it."""

    LATER = "later"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an execution gave: a reply per job, None where the model sends its own; and when its middle part was."""

    replies: Sequence[Reply | Later | None]
    infer_began: int
    infer_ended: int


Run = Callable[[Sequence[Job], int], Outcome]
"""Execute these jobs together on the instance of that number."""


def job_of(request: InferRequest, feeds: Mapping[str, Array], wanted: tuple[str, ...], items: int, to: Deliver) -> Job:
    priority, timeout = _whole_number(request, "priority"), _whole_number(request, "timeout")
    return Job(request, feeds, wanted, items, to, priority, timeout)


def _whole_number(request: InferRequest, name: str) -> int:
    value = request.parameters.get(name, 0)
    if type(value) is not int or not 0 <= value < _LARGEST:
        raise Refusal(f"{request.label}parameter '{name}' must be an unsigned integer")
    return value
