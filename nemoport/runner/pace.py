"""Which jobs are so quick that handing them to another thread would cost more than executing them."""

from __future__ import annotations

from collections.abc import Sequence

from nemoport.runner.jobs import Job

_QUICK = 150_000  # ns of the processor; about what two threads take to hand a job over and its reply back
_MOST = 256


class Pace:
    """Remembers what jobs of a shape took of the processor: a thread that was kept waiting was not slow."""

    def __init__(self, quick_ns: int = _QUICK) -> None:
        self._quick_ns = quick_ns
        self._ns: dict[object, int] = {}

    def is_quick(self, job: Job) -> bool:
        return self._ns.get((job.kind, job.items), self._quick_ns) < self._quick_ns

    def took(self, jobs: Sequence[Job], ns: int) -> None:
        """Executed together. Whatever else runs can only make them slower, so a short time is believed at once, and of
        a long one an eighth."""
        shape, each = (jobs[0].kind, jobs[0].items), ns // len(jobs)
        if shape in self._ns or len(self._ns) < _MOST:
            before = self._ns.get(shape, each)
            self._ns[shape] = each if each < before else before + (each - before) // 8
