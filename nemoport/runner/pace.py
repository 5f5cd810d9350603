"""Which jobs are so quick that handing them to another thread would cost more than executing them."""

from __future__ import annotations

from nemoport.runner.jobs import Job

_QUICK = 100_000  # ns; about what two threads take to hand a job over and its reply back
_TOO_LONG = 1_000_000  # ns
_MOST = 256


class Pace:
    """Remembers the shapes that were quick when they were last executed alone, on a thread of the model's own.

    That is measured in time of the processor: a thread that was kept waiting was not slow. A quick job that holds up
    the thread of another for too long all the same is not quick any more, until it is measured again.
    """

    def __init__(self, quick_ns: int = _QUICK, too_long_ns: int = _TOO_LONG) -> None:
        self._quick_ns, self._too_long_ns = quick_ns, too_long_ns
        self._quick: set[object] = set()

    def is_quick(self, job: Job) -> bool:
        return (job.kind, job.items) in self._quick

    def took(self, job: Job, ns: int) -> None:
        """On a thread of its own."""
        if ns >= self._quick_ns:
            self._quick.discard((job.kind, job.items))
        elif len(self._quick) < _MOST:
            self._quick.add((job.kind, job.items))

    def held_up(self, job: Job, ns: int) -> None:
        """On a thread of another, by the clock."""
        if ns >= self._too_long_ns:
            self._quick.discard((job.kind, job.items))
