"""Whether a thread that reads requests looks for the next one, or sleeps until that comes.

To sleep and to be woken takes longer than a small model: a client that asks again at once hears a third sooner from a
thread that is awake. As with Linux's haltpoll governor, it stays awake for a moment only, and only while requests have
been coming within that moment, so a client that asks now and then costs nothing.
"""

from __future__ import annotations

import time

_MOMENT = 200_000  # ns; what a client takes to ask again, and not more than a few switches of threads


class BusyPoll:
    """Of one thread."""

    def __init__(self, moment_ns: int = _MOMENT) -> None:
        self._moment = moment_ns
        self._answered, self._waits, self._was_soon = 0, False, False

    def asked(self) -> None:
        """A request has come; whatever computes its answer may need the processor more."""
        if self._waits:
            self._waits, self._was_soon = False, self._is_moment()

    def answered(self) -> None:
        self._answered, self._waits = time.monotonic_ns(), True

    def is_awake(self) -> bool:
        return self._waits and self._was_soon and self._is_moment()

    def _is_moment(self) -> bool:
        return time.monotonic_ns() - self._answered < self._moment
