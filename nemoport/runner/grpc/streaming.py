"""One call of ModelStreamInfer: requests come in and answers go out, at the same time.

    reader    request, request, ...  ->  Turn, (Turn, Response), ...  ->  writer    message, message, ...

Errors are messages, and the stream goes on. Answers come in the order of the requests, but for decoupled models, whose
answers come when they are there.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Event, Semaphore, Thread
from typing import Any

import grpc
from tritonclient.grpc import service_pb2 as pb

from nemoport.runner.grpc.messages import message_of, request_from, shortened, version_from
from nemoport.runner.jobs import Job
from nemoport.runner.refusal import Refusal
from nemoport.runner.request import Response
from nemoport.runner.server import Server

log = logging.getLogger(__name__)

_MOST_UNDER_WAY = 1024  # requests of one stream
_FINAL, _WANTS_FINAL = "triton_final_response", "triton_enable_empty_final_response"


@dataclass(eq=False, slots=True)
class Turn:
    """One request of the stream, until its last answer."""

    request: Any
    in_order: bool
    job: Job | None = None
    messages: list[Any] = field(default_factory=list)
    """That wait for the turns before."""
    ended: bool = False


@dataclass(frozen=True, slots=True)
class _Said:
    turn: Turn
    what: Response | Refusal
    """A refusal by itself: the model was not asked."""


def conversation(server: Server, requests: Iterable[Any], context: Any) -> Iterator[Any]:
    """The messages that answer the requests. Ends, and cancels what is under way, when the client has gone."""
    events: SimpleQueue[Turn | _Said | None] = SimpleQueue()
    slots, left = Semaphore(_MOST_UNDER_WAY), Event()

    def leave() -> None:
        left.set()
        events.put(None)

    context.add_callback(leave)
    Thread(target=_read, args=(server, requests, events, slots, left), name="stream", daemon=True).start()
    under_way: dict[Turn, None] = {}
    in_order: deque[Turn] = deque()
    reading = True
    try:
        while (reading or under_way) and not left.is_set():
            event = events.get()
            if event is None:
                reading = False
            elif isinstance(event, Turn):
                under_way[event] = None
                if event.in_order:
                    in_order.append(event)
            else:
                turn, messages = event.turn, _told(event)
                if not turn.in_order:
                    yield from messages
                turn.messages += messages
                turn.ended = isinstance(event.what, Refusal) or event.what.last
                while in_order and in_order[0].ended:
                    yield from in_order.popleft().messages
                if turn.ended:
                    del under_way[turn]
                    slots.release()
    finally:
        left.set()
        slots.release()
        for turn in under_way:
            if turn.job is not None:
                turn.job.cancel()


def _read(
    server: Server, requests: Iterable[Any], events: SimpleQueue[Turn | _Said | None], slots: Semaphore, left: Event
) -> None:
    try:
        for request in requests:
            slots.acquire()
            if left.is_set():
                return
            _ask(server, request, events)
            if left.is_set():
                return
    except grpc.RpcError:  # the client has gone
        return
    finally:
        events.put(None)


def _ask(server: Server, request: Any, events: SimpleQueue[Turn | _Said | None]) -> None:
    turn = Turn(request, in_order=not _is_decoupled(server, request))
    events.put(turn)
    try:
        model = server.find(request.model_name, version_from(request.model_version))
        turn.job = model.submit(request_from(request), lambda response: events.put(_Said(turn, response)))
    except Refusal as refusal:
        events.put(_Said(turn, refusal))
    except Exception as error:  # the edge of the server: one request fails, the others go on
        log.exception("a request of a stream failed")
        events.put(_Said(turn, Refusal(f"internal error: {type(error).__name__}: {error}")))


def _is_decoupled(server: Server, request: Any) -> bool:
    try:
        return server.find(request.model_name, version_from(request.model_version)).decoupled
    except Refusal:
        return False


def _told(said: _Said) -> list[Any]:
    """A message, or none: the end alone is told only to those who ask for it."""
    request, what = said.turn.request, said.what
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
