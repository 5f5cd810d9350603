"""One call of ModelStreamInfer: requests come in and answers go out, at the same time.

    message -> Turn -> model -> Response, ...  ->  messages of the turn  ->  outbox -> one message at a time

Errors are messages, and the stream goes on. Answers come in the order of the requests, but for decoupled models, whose
answers come when they are there.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from threading import RLock
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2 as pb

from nemoport.runner.grpc.calls import Call
from nemoport.runner.grpc.messages import message_of, request_from, shortened, version_from
from nemoport.runner.jobs import Job
from nemoport.runner.model import ModelVersion
from nemoport.runner.refusal import Refusal
from nemoport.runner.request import Response
from nemoport.runner.server import Server

log = logging.getLogger(__name__)

_MOST_UNDER_WAY = 1024  # requests of one stream
_MOST_HELD = 2**26  # bytes of those requests, and of answers that the client has not taken
_FINAL, _WANTS_FINAL = "triton_final_response", "triton_enable_empty_final_response"


@dataclass(eq=False, slots=True)
class Turn:
    """One request of the stream, until its last answer."""

    request: Any
    size: int
    in_order: bool = True
    job: Job | None = None
    messages: list[bytes] = field(default_factory=list)
    """That wait for the turns before."""
    ended: bool = False


def converse(server: Server, call: Call) -> None:
    """Ends when the client has said all and heard all; when it has gone, what is under way is cancelled."""
    conversation = _Conversation(server, call)
    call.when_left(conversation.leave)
    conversation.hear_next()


class _Conversation:
    """Heard on the thread that polls, answered on those of instances too: the lock is for what both see. A client that
    takes its answers slowly is heard slowly, so that they do not pile up."""

    def __init__(self, server: Server, call: Call) -> None:
        self._server, self._call, self._lock = server, call, RLock()
        self._under_way: dict[Turn, None] = {}
        self._in_order: deque[Turn] = deque()
        self._outbox: deque[bytes] = deque()
        self._held = 0  # bytes
        self._sending = self._heard_all = self._full = self._ended = False

    def hear_next(self) -> None:
        self._call.receive(self._hear)

    def leave(self) -> None:
        with self._lock:
            self._ended = True
            self._outbox.clear()
            left = [turn.job for turn in self._under_way if turn.job is not None]
        for job in left:
            job.cancel()

    def _hear(self, content: bytes | None) -> None:
        if content is None:
            with self._lock:
                self._heard_all = True
                self._go_on()
            return
        try:
            request = pb.ModelInferRequest.FromString(content)
        except DecodeError:
            self.leave()
            self._call.end(grpc.StatusCode.INTERNAL, "Exception deserializing request!")
            return
        self._ask(request, len(content))
        with self._lock:
            full = self._full = self._is_full()
        if not full:
            self.hear_next()

    def _ask(self, request: Any, size: int) -> None:
        turn = Turn(request, size)
        try:
            model = self._server.find(request.model_name, version_from(request.model_version))
        except Refusal as refusal:
            self._begin(turn)
            self._told(turn, refusal)
            return
        turn.in_order = not model.decoupled
        self._begin(turn)
        self._submit(turn, model)

    def _submit(self, turn: Turn, model: ModelVersion) -> None:
        try:
            job = model.submit(request_from(turn.request), partial(self._told, turn), self._call.when_idle)
            with self._lock:
                turn.job = None if turn.ended else job  # which holds the turn
        except Refusal as refusal:
            self._told(turn, refusal)
        except Exception as error:  # the edge of the server: one request fails, the others go on
            log.exception("a request of a stream failed")
            self._told(turn, Refusal(f"internal error: {type(error).__name__}: {error}"))

    def _begin(self, turn: Turn) -> None:
        with self._lock:
            self._under_way[turn] = None
            self._held += turn.size
            if turn.in_order:
                self._in_order.append(turn)

    def _told(self, turn: Turn, what: Response | Refusal) -> None:
        """What the model said, or that it was not asked."""
        messages = [message.SerializeToString() for message in _messages(turn.request, what)]
        with self._lock:
            if turn.ended:  # it failed after its last answer
                return
            self._held += sum(map(len, messages))
            (turn.messages if turn.in_order else self._outbox).extend(messages)
            turn.ended = isinstance(what, Refusal) or what.last
            while self._in_order and self._in_order[0].ended:
                self._outbox.extend(self._in_order.popleft().messages)
            if turn.ended:
                del self._under_way[turn]
                turn.job, self._held = None, self._held - turn.size
            hears_again = self._has_room_again()
            self._go_on()
        if hears_again:
            self.hear_next()

    def _go_on(self) -> None:
        """Send the next message, or the end; with the lock."""
        if self._sending or self._ended:
            return
        if self._outbox:
            self._sending = True
            message = self._outbox.popleft()
            self._call.send(message, partial(self._sent, len(message)))
        elif self._heard_all and not self._under_way:
            self._ended = True
            self._call.end()

    def _sent(self, size: int) -> None:
        with self._lock:
            self._sending, self._held = False, self._held - size
            hears_again = self._has_room_again()
            self._go_on()
        if hears_again:
            self.hear_next()

    def _is_full(self) -> bool:
        return max(len(self._under_way), len(self._in_order)) >= _MOST_UNDER_WAY or self._held >= _MOST_HELD

    def _has_room_again(self) -> bool:
        """Whether what was too full to hear may hear again; with the lock."""
        hears_again = self._full and not self._ended and not self._is_full()
        self._full = self._full and not hears_again
        return hears_again


def _messages(request: Any, what: Response | Refusal) -> list[Any]:
    """A message, or none: the end alone is told only to those who ask for it."""
    if isinstance(what, Refusal):
        return [_refused(request, what)]
    if isinstance(what.content, Refusal):
        message = _refused(request, what.content)
        message.infer_response.model_name = request.model_name
    elif what.content is not None:
        message = pb.ModelStreamInferResponse(infer_response=message_of(what.content))
    elif _WANTS_FINAL in request.parameters and request.parameters[_WANTS_FINAL].bool_param:
        asked = {"model_name": request.model_name, "model_version": request.model_version, "id": request.id}
        message = pb.ModelStreamInferResponse(infer_response=pb.ModelInferResponse(**asked))
    else:
        return []
    message.infer_response.parameters[_FINAL].bool_param = what.last
    return [message]


def _refused(request: Any, refusal: Refusal) -> Any:
    """The response names the request, so that a client of many knows which failed."""
    return pb.ModelStreamInferResponse(
        error_message=shortened(refusal), infer_response=pb.ModelInferResponse(id=request.id)
    )
