"""uvicorn's protocol, for answers that are small and many.

The head and the body of an answer go in one write, for each write wakes the client; and the loop looks for the next
request before it sleeps.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from nemoport.runner.busy_poll import BusyPoll


class Corked:
    """A transport that gathers what is written, until `flush` or for one turn of the event loop."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._waiting: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self._waiting:
            self._loop.call_soon(self.flush)
        self._waiting.append(data)

    def flush(self) -> None:
        if self._waiting and not self._transport.is_closing():
            self._transport.writelines(self._waiting)
        self._waiting = []

    def close(self) -> None:
        self.flush()
        self._transport.close()


class Watch:
    """Keeps the loop awake while its thread is to be."""

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
    """`watch` is that of all connections of a loop."""

    def __init__(self, watch: Watch, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._watch = watch

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._corked = Corked(transport, self.loop)
        super().connection_made(cast(asyncio.Transport, self._corked))

    def on_message_begin(self) -> None:
        self._watch.asked()
        super().on_message_begin()

    def on_response_complete(self) -> None:
        self._corked.flush()
        super().on_response_complete()
        self._watch.answered(self.loop)
