"""How a coroutine asks a model and waits for what it answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from threading import get_ident
from typing import Any, TypeVar

from nemoport.runner.model import ModelVersion
from nemoport.runner.request import InferRequest, InferResponse, Response

_Said = TypeVar("_Said")


async def ask(
    model: ModelVersion, request: InferRequest, left: Callable[[], Coroutine[Any, Any, None]]
) -> InferResponse:
    """The only answer, for models that are not decoupled; cancelled when `left` ends, which is when the client goes."""
    loop, here = asyncio.get_running_loop(), get_ident()
    answered: asyncio.Future[Response | None] = loop.create_future()
    watching: list[asyncio.Task[None]] = []

    def settle(response: Response | None) -> None:
        if not answered.done():
            answered.set_result(response)

    def deliver(response: Response) -> None:
        if get_ident() == here:
            settle(response)
        else:
            soon(loop, settle, response)

    def watch() -> None:
        if not answered.done():
            watching.append(loop.create_task(left()))
            watching[0].add_done_callback(lambda _: settle(None))

    job = model.submit(request, deliver, loop.call_soon)
    loop.call_soon(watch)  # when quick jobs have been answered: most need no watch
    try:
        response = await answered
    finally:
        job.cancel()  # of no consequence to one that is answered
        for task in watching:
            task.cancel()
    if response is None:
        raise ConnectionError("the client left before its request was answered")
    return response.value()


async def ask_all(model: ModelVersion, request: InferRequest) -> AsyncGenerator[Response, None]:
    """Every answer as it comes, the last one marked; cancelled when the iterator is closed before."""
    loop = asyncio.get_running_loop()
    answers: asyncio.Queue[Response] = asyncio.Queue()
    job = model.submit(request, lambda response: soon(loop, answers.put_nowait, response), loop.call_soon)
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
