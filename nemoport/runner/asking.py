"""How a coroutine, or a thread, asks a model and waits for what it answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from queue import SimpleQueue
from threading import get_ident
from typing import Any, TypeVar

from nemoport.runner.model import ModelVersion
from nemoport.runner.refusal import Code, Refusal
from nemoport.runner.request import InferRequest, InferResponse, Response

_Said = TypeVar("_Said")


async def ask(
    model: ModelVersion, request: InferRequest, left: Callable[[], Coroutine[Any, Any, None]]
) -> InferResponse:
    """The only answer, for models that are not decoupled; cancelled when `left` ends, which is when the client goes."""
    loop, here = asyncio.get_running_loop(), get_ident()
    answered: asyncio.Future[Response] = loop.create_future()

    def settle(response: Response) -> None:
        if not answered.done():
            answered.set_result(response)

    def deliver(response: Response) -> None:
        if get_ident() == here:  # a quick model answers at once
            settle(response)
        else:
            soon(loop, settle, response)

    job = model.submit(request, deliver)
    if answered.done():
        return answered.result().value()
    leaving = asyncio.create_task(left())
    try:
        ends: set[asyncio.Future[Any]] = {answered, leaving}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if not answered.done():
            raise ConnectionError("the client left before its request was answered")
        return answered.result().value()
    finally:
        job.cancel()  # of no consequence to one that is answered
        leaving.cancel()


async def ask_all(model: ModelVersion, request: InferRequest) -> AsyncGenerator[Response, None]:
    """Every answer as it comes, the last one marked; cancelled when the iterator is closed before."""
    loop = asyncio.get_running_loop()
    answers: asyncio.Queue[Response] = asyncio.Queue()
    job = model.submit(request, lambda response: soon(loop, answers.put_nowait, response))
    try:
        while True:
            response = await answers.get()
            yield response
            if response.last:
                return
    finally:
        job.cancel()


def soon(loop: asyncio.AbstractEventLoop, settle: Callable[[_Said], object], said: _Said) -> None:
    """Called from another thread."""
    try:
        loop.call_soon_threadsafe(settle, said)
    except RuntimeError:  # the loop has ended, and with it whoever waited
        return


def ask_and_wait(
    model: ModelVersion, request: InferRequest, when_left: Callable[[Callable[[], None]], bool]
) -> InferResponse:
    """The only answer. `when_left` takes what to call when the client has gone, and says whether it is still there."""
    answers: SimpleQueue[Response] = SimpleQueue()
    job = model.submit(request, answers.put)

    def leave() -> None:
        job.cancel()
        answers.put(Response(Refusal(f"{request.label}request is cancelled", Code.CANCELLED)))

    if answers.empty() and not when_left(leave):
        leave()
    return answers.get().value()
