"""The end of the process: one limit over all of it, whatever is still under way."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType

log = logging.getLogger(__name__)

_EXCEEDED = 1  # the exit status of a tritonserver that could not stop in time
_LAST_WORDS = 1.0  # seconds after the limit, in which the doors tell those who wait


class Limit:
    """Once it has begun, the block must end within so many seconds, at least one; a second later the process exits.

    What is under way by then holds threads that nothing can stop: a model that initializes, say.
    """

    def __init__(self, seconds: float, under_way: Callable[[], Sequence[str]]) -> None:
        self.seconds, self._under_way = max(seconds, 1), under_way
        self._timer = threading.Timer(self.seconds, self._exceed)
        self._timer.daemon = True
        self._exceeded = threading.Event()

    def begin(self) -> None:
        if not self._timer.is_alive():
            self._timer.start()

    def __enter__(self) -> Limit:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if self._exceeded.is_set():
            os._exit(_EXCEEDED)

    def _exceed(self) -> None:
        self._exceeded.set()
        told = ", ".join(self._under_way()) or "clients that have not read their answers"
        log.error("the end took more than --exit-timeout-secs=%g, exiting; under way: %s", self.seconds, told)
        time.sleep(_LAST_WORDS)
        os._exit(_EXCEEDED)
