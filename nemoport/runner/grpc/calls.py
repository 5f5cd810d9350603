"""Calls of gRPC on one thread, which polls grpcio's completion queue and answers there what is quick.

`grpc.server` hands a call to a thread of a pool, which waits until the thread that polls has heard its message: with
eight clients ten switches of threads for a call and five times the processor time, as `benchmarks/README.md` shows.
This is the only module that sees `grpc._cython`, and it asks what grpcio's own `_server.py` asks.

    request_call -> ReceiveMessage -> ... -> SendInitialMetadata, SendMessage, SendStatusFromServer
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grpc
from grpc._cython import cygrpc

from nemoport.runner.busy_poll import BusyPoll
from nemoport.runner.jobs import WhenIdle

log = logging.getLogger(__name__)

_CALL, _ENDED = object(), object()
"""Tags of the two events that belong to no call; the tag of any other is what to do with it."""
_NO_FLAGS = 0
_NOW = 0  # a time long past
_MOST_HEARD = 256  # events before other work must be done; a call has four
_OK = grpc.StatusCode.OK.value[0]


class Call:
    """One call. Methods begin on the thread that polls, and every `then` is called there; any thread may answer."""

    __slots__ = ("_begun", "_core", "_leave", "left", "when_idle")

    def __init__(self, core: Any, when_idle: WhenIdle) -> None:
        self._core, self._begun = core, False
        self.when_idle: WhenIdle | None = when_idle
        """Of the thread that polls; None where another goes on with the call."""
        self._leave: Callable[[], object] = _nothing
        self.left = False
        """The client has gone, or its time is over."""
        core.start_server_batch((cygrpc.ReceiveCloseOnServerOperation(_NO_FLAGS),), self._closed)

    def when_left(self, leave: Callable[[], object]) -> None:
        """Said on the thread that polls."""
        self._leave = leave
        if self.left:
            leave()

    def receive(self, then: Callable[[bytes | None], object]) -> None:
        """The next message of the client, None when there are no more."""
        operation = cygrpc.ReceiveMessageOperation(_NO_FLAGS)
        self._core.start_server_batch((operation,), lambda event: then(operation.message()))

    def send(self, message: bytes, then: Callable[[], object]) -> None:
        """One of several; the next may be sent when this is."""
        operations = (*self._beginning(), cygrpc.SendMessageOperation(message, _NO_FLAGS))
        self._core.start_server_batch(operations, lambda event: then())

    def answer(self, message: bytes) -> None:
        """The only message, and the end."""
        if not self.left:
            sending = cygrpc.SendMessageOperation(message, _NO_FLAGS)
            self._core.start_server_batch((*self._beginning(), sending, _status(_OK, b"")), _done)

    def end(self, code: grpc.StatusCode = grpc.StatusCode.OK, details: str = "") -> None:
        if not self.left:
            status = _status(code.value[0], details.encode())
            self._core.start_server_batch((*self._beginning(), status), _done)

    def _beginning(self) -> tuple[Any, ...]:
        if self._begun:
            return ()
        self._begun = True
        return (cygrpc.SendInitialMetadataOperation(None, _NO_FLAGS),)

    def _closed(self, event: Any) -> None:
        """Every call has this event; of one that was answered it says that nobody left."""
        if event.batch_operations[0].cancelled():
            self.left = True
            self._leave()
        self._leave = _nothing  # which may hold the call


Method = Callable[[Call], None]
"""Begins to answer a call, and does not wait."""


class CallServer:
    """Listens from the start, to `address`; port 0 takes a free one."""

    def __init__(self, address: str, methods: Mapping[bytes, Method], options: Sequence[tuple[str, int]]) -> None:
        self._methods = methods
        self._queue, self._core = cygrpc.CompletionQueue(), cygrpc.Server(tuple(options), False)
        self._core.register_completion_queue(self._queue)
        self._lock = threading.Lock()
        """Held where the core is asked for a call, ended or destroyed: while one thread does that, no other may."""
        self._closing = False
        self._idle_work: deque[Callable[[], None]] = deque()
        self._busy_poll = BusyPoll()
        self.port: int = self._core.add_http2_port(address.encode())
        """0 where the address cannot be listened to."""
        if self.port:
            self._core.start()
            self._request_call()
            self._thread = threading.Thread(target=self._poll, name="grpc", daemon=True)
            self._thread.start()

    def close(self, seconds: float) -> None:
        """Take no more calls, and let those under way finish within so many seconds."""
        with self._lock:
            self._closing = True
            self._core.shutdown(self._queue, _ENDED)
        self._thread.join(seconds)
        if self._thread.is_alive():
            with self._lock:
                self._core.cancel_all_calls()
            self._thread.join()

    def _request_call(self) -> None:
        with self._lock:
            if not self._closing:
                self._core.request_call(self._queue, self._queue, _CALL)

    def _poll(self) -> None:
        ended, heard = False, 0
        while True:
            looks = ended or self._idle_work or self._busy_poll.is_awake()
            event = self._queue.poll(_NOW if looks else None)
            heard += 1
            if event.tag is None or heard == _MOST_HEARD:
                heard = 0
                while self._idle_work:
                    _called(self._idle_work.popleft())
            if event.tag is _CALL:
                if event.success:
                    self._busy_poll.asked()
                    self._request_call()
                    _called(self._begin, event)
            elif event.tag is _ENDED:
                with self._lock:
                    self._core.destroy()
                ended = True  # but for what lies in the queue; it is not shut, for an instance may still answer into it
            elif event.tag is _done:
                self._busy_poll.answered()
            elif event.tag is not None:
                _called(event.tag, event)
            elif ended:
                return
            del event  # it may hold a call, which must not live while we wait

    def _begin(self, event: Any) -> None:
        call, method = Call(event.call, self._idle_work.append), self._methods.get(event.call_details.method)
        if method is None:
            call.end(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        elif not _called(method, call):
            call.end(grpc.StatusCode.INTERNAL, "internal error")


def _called(what: Callable[..., object], *given: Any) -> bool:
    try:
        what(*given)
        return True
    except Exception:  # the edge of the thread: one call is lost, the others go on
        log.exception("a call of gRPC failed")
        return False


def _status(code: int, details: bytes) -> Any:
    return cygrpc.SendStatusFromServerOperation(None, code, details, _NO_FLAGS)


def _done(event: Any) -> None:
    """What was sent is on its way."""


def _nothing() -> None:
    """Nobody minds that the client left."""
