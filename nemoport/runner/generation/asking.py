"""How a coroutine asks for a text: in pieces, or whole."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator

from nemoport.runner.asking import soon
from nemoport.runner.generation.engine import Continuation
from nemoport.runner.generation.texts import Deliver, Generator, Piece, TextRequest
from nemoport.runner.refusal import Code, Refusal
from nemoport.runner.statistics import Statistics


async def pieces(generator: Generator, request: TextRequest) -> AsyncGenerator[Piece, None]:
    """The text as it is made; its row is free once the iterator is closed."""
    loop = asyncio.get_running_loop()
    heard: asyncio.Queue[Piece | Refusal] = asyncio.Queue()
    who = _submit(generator, request, lambda piece: soon(loop, heard.put_nowait, piece))
    try:
        while True:
            piece = await heard.get()
            if isinstance(piece, Refusal):
                raise piece
            yield piece
            if piece.reason:
                return
    finally:
        who.cancel()


async def whole(generator: Generator, request: TextRequest) -> Piece:
    """The text in one piece; cancelled with the coroutine."""
    loop, said = asyncio.get_running_loop(), list[str]()
    ended: asyncio.Future[Piece | Refusal] = loop.create_future()

    def settle(piece: Piece | Refusal) -> None:
        if not ended.done():
            ended.set_result(piece)

    def deliver(piece: Piece | Refusal) -> None:
        if isinstance(piece, Refusal):
            soon(loop, settle, piece)
            return
        said.append(piece.text)
        if piece.reason:
            soon(loop, settle, Piece("".join(said), piece.tokens, piece.reason))

    who = _submit(generator, request, deliver)
    try:
        piece = await ended
    finally:
        who.cancel()
    if isinstance(piece, Refusal):
        raise piece
    return piece


def _submit(generator: Generator, request: TextRequest, deliver: Deliver) -> Continuation:
    """The same as the generator's, and the request is counted where a request for tensors is."""
    statistics, asked, begun = generator.statistics, time.monotonic_ns(), False
    tell = end_counted(statistics, asked, deliver)

    def count(piece: Piece | Refusal) -> None:
        nonlocal begun
        if not begun and not isinstance(piece, Refusal):
            statistics.first_response(time.monotonic_ns() - asked)
        begun = True
        tell(piece)

    try:
        return generator.submit(request, count)
    except Refusal as refusal:
        if refusal.code is Code.UNAVAILABLE:
            statistics.refused(refusal)
        raise


def end_counted(statistics: Statistics, asked: int, deliver: Deliver) -> Deliver:
    """The same, and the request counts once its text is whole, or will not be; `asked` is of `time.monotonic_ns`."""

    def count(piece: Piece | Refusal) -> None:
        if isinstance(piece, Refusal):
            statistics.failed(time.monotonic_ns() - asked, piece)
        elif piece.reason:
            statistics.answered(time.monotonic_ns() - asked)
        deliver(piece)

    return count
