"""A request and its answer as the handlers see them, and their passage through ASGI."""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from concurrent.futures import Executor
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.types import Receive, Send

from nemoport.runner.refusal import Code, Refusal

JSON = (b"content-type", b"application/json")
TEXT = (b"content-type", b"text/plain")
EVENTS = (b"content-type", b"text/event-stream; charset=utf-8")
BINARY = (b"content-type", b"application/octet-stream")
_SMALL = 2**18  # bytes that are read or written in less time than a thread takes to wake
_Made = TypeVar("_Made")
_PATIENCE = 16  # times the limit
_WINDOWS = {b"gzip": 16 + zlib.MAX_WBITS, b"deflate": zlib.MAX_WBITS}


async def _never() -> None:
    await asyncio.Event().wait()


@dataclass(frozen=True, slots=True)
class Call:
    """`model` and `version` come from the path; `max_bytes` bounds the body, unpacked too; `left` ends when the client
    has gone."""

    headers: Mapping[bytes, bytes]
    body: bytes
    max_bytes: int
    model: str = ""
    version: int | None = None
    left: Callable[[], Coroutine[Any, Any, None]] = _never

    @property
    def size(self) -> int:
        """Bytes of the body; of one that is packed, as many as it may hold."""
        return self.max_bytes if b"content-encoding" in self.headers else len(self.body)


@dataclass(frozen=True, slots=True)
class Answer:
    status: int = 200
    body: bytes = b""
    headers: tuple[tuple[bytes, bytes], ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Stream:
    """An answer whose end is not known when it begins."""

    status: int
    parts: AsyncGenerator[bytes, None]
    headers: tuple[tuple[bytes, bytes], ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Later:
    """An answer that takes long to make, and is not made to its end when the client has gone."""

    answer: Coroutine[Any, Any, Answer | Stream]


async def unless_left(receive: Receive, work: Coroutine[Any, Any, _Made]) -> _Made:
    """What the work gives; it ends early, and a ConnectionError is raised, when the client has gone."""
    making, left = asyncio.create_task(work), asyncio.create_task(disconnected(receive))
    try:
        await asyncio.wait({making, left}, return_when=asyncio.FIRST_COMPLETED)
        if not making.done():
            raise ConnectionError("the client left before its answer was made")
        return await making
    finally:
        making.cancel()
        left.cancel()
        await asyncio.wait({making, left})


async def aside(threads: Executor, size: int, work: Callable[..., _Made], *arguments: Any) -> _Made:
    """Work on so many bytes: here when they are few, else in a thread, so that the loop goes on."""
    if size <= _SMALL:
        return work(*arguments)
    return await asyncio.get_running_loop().run_in_executor(threads, work, *arguments)


def json_answer(value: Any) -> Answer:
    return Answer(200, as_json(value), (JSON,))


def error_answer(message: str, status: int) -> Answer:
    return Answer(status, as_json({"error": message}), (JSON,))


_ENCODER = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False)  # dumps would make one each time


def as_json(value: Any) -> bytes:
    """Without spaces, and with text as it is; halves of surrogate pairs, which UTF-8 has not, as a question mark."""
    return _ENCODER.encode(value).encode(errors="replace")


async def read_body(receive: Receive, max_bytes: int) -> bytes:
    """A body that is too large is read to its end and dropped, so that the client is there to hear of it."""
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError("the client left before its request was complete")
        chunk = message.get("body", b"")
        size += len(chunk)
        if size <= max_bytes:
            chunks.append(chunk)
        elif size > _PATIENCE * max_bytes:
            raise _too_large(size, max_bytes)
        if not message.get("more_body", False):
            break
    if size > max_bytes:
        raise _too_large(size, max_bytes)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


async def send_answer(send: Send, answer: Answer) -> None:
    length = (b"content-length", b"%d" % len(answer.body))
    await send({"type": "http.response.start", "status": answer.status, "headers": [*answer.headers, length]})
    await send({"type": "http.response.body", "body": answer.body})


async def send_stream(send: Send, receive: Receive, stream: Stream) -> None:
    """Ends, and ends what makes the parts, when the client has gone."""
    await send({"type": "http.response.start", "status": stream.status, "headers": list(stream.headers)})
    with suppress(ConnectionError):
        await unless_left(receive, _send_parts(send, stream.parts))


async def _send_parts(send: Send, made: AsyncGenerator[bytes, None]) -> None:
    async with aclosing(made) as parts:
        async for part in parts:
            if part:
                await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


def unpacked(call: Call) -> bytes:
    """The body after Content-Encoding; never more than `max_bytes`, however small it was packed."""
    encoding = call.headers.get(b"content-encoding", b"identity").strip().lower()
    if encoding in (b"identity", b""):
        return call.body
    if encoding not in _WINDOWS:
        raise Refusal(f"unsupported Content-Encoding '{encoding.decode('latin-1')}', send identity, gzip or deflate")
    inflate = zlib.decompressobj(_WINDOWS[encoding])
    try:
        body = inflate.decompress(call.body, call.max_bytes + 1)
    except zlib.error as error:
        raise Refusal(f"failed to decompress the request: {error}") from None
    if len(body) > call.max_bytes:
        raise _too_large(len(body), call.max_bytes)
    if not inflate.eof:
        raise Refusal("failed to decompress the request: it ends in the middle")
    return body


def packed(answer: Answer, call: Call) -> Answer:
    """In the first way of packing that the client takes and we know."""
    accepted = call.headers.get(b"accept-encoding")
    for each in accepted.lower().split(b",") if accepted else ():
        if (encoding := each.partition(b";")[0].strip()) in _WINDOWS:
            deflate = zlib.compressobj(wbits=_WINDOWS[encoding])
            body = deflate.compress(answer.body) + deflate.flush()
            return Answer(answer.status, body, (*answer.headers, (b"content-encoding", encoding)))
    return answer


def _too_large(size: int, max_bytes: int) -> Refusal:
    return Refusal(
        f"Request has a byte_size of {size} bytes or more that exceeds the maximum allowed value of {max_bytes} bytes. "
        "Use --http-max-input-size to increase the limit.",
        Code.INVALID_ARG,
    )
