"""How a coroutine asks a model and waits for what it answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from nemoport.runner.model import ModelVersion
from nemoport.runner.request import InferRequest, InferResponse, Response


async def ask(model: ModelVersion, request: InferRequest) -> InferResponse:
    """The only answer, for models that are not decoupled; cancelled with the coroutine."""
    loop = asyncio.get_running_loop()
    answered: asyncio.Future[Response] = loop.create_future()

    def settle(response: Response) -> None:
        if not answered.done():
            answered.set_result(response)

    job = model.submit(request, lambda response: _soon(loop, settle, response))
    try:
        return (await answered).value()
    except asyncio.CancelledError:
        job.cancel()
        raise


async def ask_all(model: ModelVersion, request: InferRequest) -> AsyncGenerator[Response, None]:
    """Every answer as it comes, the last one marked; cancelled when the iterator is closed before."""
    loop = asyncio.get_running_loop()
    answers: asyncio.Queue[Response] = asyncio.Queue()
    job = model.submit(request, lambda response: _soon(loop, answers.put_nowait, response))
    try:
        while True:
            response = await answers.get()
            yield response
            if response.last:
                return
    finally:
        job.cancel()


def _soon(loop: asyncio.AbstractEventLoop, settle: Callable[[Response], object], response: Response) -> None:
    try:
        loop.call_soon_threadsafe(settle, response)
    except RuntimeError:  # the loop has ended, and with it whoever waited
        return
