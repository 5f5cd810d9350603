"""uvicorn's protocol on a loop that looks for the next request before it sleeps."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from nemoport.runner.busy_poll import BusyPoll


class Watch:
    """Of the connections of one loop. Keeps it awake as long as its thread is to be."""

    def __init__(self) -> None:
        self._poll, self._turning = BusyPoll(), False

    def asked(self) -> None:
        self._poll.asked()

    def answered(self, loop: asyncio.AbstractEventLoop) -> None:
        self._poll.answered()
        if not self._turning:
            self._turn(loop)

    def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        """A loop that has something to call does not sleep."""
        self._turning = self._poll.is_awake()
        if self._turning:
            loop.call_soon(self._turn, loop)


class Protocol(HttpToolsProtocol):
    def __init__(self, watch: Watch, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._watch = watch

    def on_message_begin(self) -> None:
        self._watch.asked()
        super().on_message_begin()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch.answered(self.loop)
