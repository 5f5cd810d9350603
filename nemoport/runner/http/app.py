"""The endpoints as a table, and the ASGI application that looks them up."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import Executor
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

import nemoport
from nemoport.runner.asking import ask, ask_all
from nemoport.runner.contract import raw_input
from nemoport.runner.http import generate as generation
from nemoport.runner.http import openai, texts
from nemoport.runner.http.exchange import (
    BINARY,
    EVENTS,
    JSON,
    TEXT,
    Answer,
    Call,
    Later,
    Stream,
    aside,
    disconnected,
    error_answer,
    json_answer,
    packed,
    read_body,
    send_answer,
    send_stream,
    unless_left,
    unpacked,
)
from nemoport.runner.http.head import Form, parse_json
from nemoport.runner.http.wire import RAW_FORM, format_response, parse_request
from nemoport.runner.model import ModelVersion
from nemoport.runner.overrides import overrides_from
from nemoport.runner.refusal import Code, Refusal
from nemoport.runner.request import InferRequest, InferResponse
from nemoport.runner.server import EXTENSIONS, Server
from nemoport.runner.threads import Threads

log = logging.getLogger(__name__)

_ONE_RESPONSE = (
    "generate expects model to produce exactly 1 response, use generate stream for model that generates various number "
    "of responses"
)
_YES, _DONE = Answer(headers=(TEXT,)), Answer(headers=(JSON,))  # as Triton calls what has no body
_HEADER_LENGTH = b"inference-header-content-length"
_LONGEST_NUMBER = 19  # digits of 2^63


def live(server: Server, call: Call) -> Answer:
    return _YES


def ready(server: Server, call: Call) -> Answer:
    return _YES if server.ready() else Answer(400, headers=(TEXT,))


def server_metadata(server: Server, call: Call) -> Answer:
    return json_answer({"name": server.name, "version": nemoport.__version__, "extensions": EXTENSIONS})


def model_metadata(server: Server, call: Call) -> Answer:
    return json_answer(server.metadata(call.model, call.version))


def model_ready(server: Server, call: Call) -> Answer:
    try:
        server.find(call.model, call.version)
    except Refusal:
        return error_answer("Model version not ready", 400)
    return _YES


def model_config(server: Server, call: Call) -> Answer:
    return json_answer(server.find(call.model, call.version).config_json())


async def infer(server: Server, call: Call, threads: Executor) -> Answer:
    """Small bodies are read and written here, large ones in a thread, so that the loop goes on."""
    target = server.find(call.model, call.version)
    if target.decoupled:
        raise Refusal("HTTP end point doesn't support models with decoupled transaction policy", Code.UNSUPPORTED)
    request, form = await aside(threads, call.size, _read_infer, target, call)
    response = await ask(target, request, call.left)
    return await aside(threads, response.size, _written_infer, response, form, call)


async def generate(server: Server, call: Call, threads: Executor) -> Later:
    target = server.find(call.model, call.version)
    if target.generator:
        return Later(texts.generate(target, target.generator, call, threads))
    return Later(_generate(target, call, threads))


async def generate_stream(server: Server, call: Call, threads: Executor) -> Later:
    target = server.find(call.model, call.version)
    if target.generator:
        return Later(texts.generate_stream(target, target.generator, call, threads))
    return Later(_generate_stream(target, call, threads))


async def _generate(target: ModelVersion, call: Call, threads: Executor) -> Answer:
    request = await aside(threads, call.size, _read_generate, target, call)
    answers = [response async for response in ask_all(target, request)]
    contents = [response.value() for response in answers if response.content is not None]
    if len(contents) == 1:
        return json_answer(await aside(threads, contents[0].size, generation.members, contents[0]))
    return error_answer(_ONE_RESPONSE, 200)  # 200 is Triton's


async def _generate_stream(target: ModelVersion, call: Call, threads: Executor) -> Stream:
    """The status waits for the first response, which may be an error."""
    answers = ask_all(target, await aside(threads, call.size, _read_generate, target, call))
    first = await anext(answers)
    status = first.content.code.http if isinstance(first.content, Refusal) else 200

    async def events() -> AsyncGenerator[bytes, None]:
        async with aclosing(answers):
            yield await aside(threads, first.size, generation.event, first)
            async for response in answers:
                yield await aside(threads, response.size, generation.event, response)

    return Stream(status, events(), (EVENTS,))


def log_settings(server: Server, call: Call) -> Answer:
    return json_answer(server.log_settings.update(parse_json(unpacked(call)) if call.body else {}))


def model_statistics(server: Server, call: Call) -> Answer:
    return json_answer({"model_stats": server.statistics(call.model, call.version)})


def repository_index(server: Server, call: Call) -> Answer:
    only_ready = parse_json(unpacked(call)).get("ready", False)
    if not isinstance(only_ready, bool):
        raise Refusal("Invalid value for 'ready': expected a boolean")
    return json_answer(server.index(only_ready))


def load(server: Server, call: Call) -> Answer:
    server.check_control()
    parameters = parse_json(unpacked(call)).get("parameters", {})
    if not isinstance(parameters, dict):
        raise Refusal("Unable to parse 'parameters': attempt to access JSON non-object as object")
    server.load(call.model, overrides_from(call.model, parameters))
    return _DONE


def unload(server: Server, call: Call) -> Answer:
    server.check_control()
    parameters = parse_json(unpacked(call)).get("parameters")
    asked = parameters.get("unload_dependents") if isinstance(parameters, dict) else None
    server.unload(call.model, with_members=asked is True)
    return _DONE


def _read_generate(target: ModelVersion, call: Call) -> InferRequest:
    return generation.request_of(unpacked(call), target.contract)


def _read_infer(target: ModelVersion, call: Call) -> tuple[InferRequest, Form]:
    body = unpacked(call)
    header_length = _header_length(call, len(body))
    if header_length == 0:
        return InferRequest((raw_input(body, target.contract),)), RAW_FORM
    return parse_request(body, header_length, call.model)


def _written_infer(response: InferResponse, form: Form, call: Call) -> Answer:
    content, json_length = format_response(response, form)
    if json_length is None:
        return packed(Answer(200, content, (JSON,)), call)
    return packed(Answer(200, content, (BINARY, (_HEADER_LENGTH, b"%d" % json_length))), call)


Handler = Callable[[Server, Call, Executor], Awaitable[Answer | Stream | Later]]


def at_once(handler: Callable[[Server, Call], Answer]) -> Handler:
    async def answer(server: Server, call: Call, threads: Executor) -> Answer:
        return handler(server, call)

    return answer


def in_thread(handler: Callable[[Server, Call], Answer]) -> Handler:
    """For a handler that reads files or waits."""

    async def answer(server: Server, call: Call, threads: Executor) -> Answer:
        return await asyncio.get_running_loop().run_in_executor(threads, handler, server, call)

    return answer


@dataclass(frozen=True)
class Route:
    pattern: re.Pattern[str]
    method: str
    handler: Handler
    controls: bool = False
    """The threads that it waits in are those of control: a request for an answer of a model never waits for them."""


_MODEL = r"/v2/models/(?P<model>[^/]+)(?:/versions/(?P<version>[0-9]+))?"
ROUTES = (
    Route(re.compile(_MODEL + "/infer"), "POST", infer),
    Route(re.compile(_MODEL + "/generate"), "POST", generate),
    Route(re.compile(_MODEL + "/generate_stream"), "POST", generate_stream),
    Route(re.compile("/v2/logging"), "GET", at_once(log_settings)),
    Route(re.compile("/v2/logging"), "POST", in_thread(log_settings)),
    Route(re.compile("/v2/health/live"), "GET", at_once(live)),
    Route(re.compile("/v2/health/ready"), "GET", at_once(ready)),
    Route(re.compile("/v2"), "GET", at_once(server_metadata)),
    Route(re.compile("/v2/models/stats"), "GET", at_once(model_statistics)),
    Route(re.compile(_MODEL + "/stats"), "GET", at_once(model_statistics)),
    Route(re.compile(_MODEL + "/ready"), "GET", at_once(model_ready)),
    Route(re.compile(_MODEL + "/config"), "GET", at_once(model_config)),
    Route(re.compile(_MODEL), "GET", at_once(model_metadata)),
    Route(re.compile("/v1/models"), "GET", openai.models),
    Route(re.compile("/v1/models/(?P<model>[^/]+)"), "GET", openai.model),
    Route(re.compile("/v1/completions"), "POST", openai.completions),
    Route(re.compile("/v1/chat/completions"), "POST", openai.chat_completions),
    Route(re.compile("/v2/repository/index"), "POST", in_thread(repository_index), controls=True),
    Route(re.compile("/v2/repository/models/(?P<model>[^/]+)/load"), "POST", in_thread(load), controls=True),
    Route(re.compile("/v2/repository/models/(?P<model>[^/]+)/unload"), "POST", in_thread(unload), controls=True),
)


def application(server: Server, threads: Threads, max_bytes: int) -> ASGIApp:
    """`max_bytes` bounds the body of a request."""

    async def answered(scope: Scope, receive: Receive) -> Answer | Stream:
        there = False
        path = scope["raw_path"].decode("latin-1")  # as it is written: Triton decodes no %2F, in names neither
        for route in ROUTES:
            if match := route.pattern.fullmatch(path):
                there = True
                if scope["method"] == route.method:
                    break
        else:
            return error_answer("Method Not Allowed", 405) if there else error_answer("Not Found", 404)
        assert match
        headers = dict(scope["headers"])
        body = await read_body(receive, max_bytes)
        call = _call(match, headers, body, max_bytes, partial(disconnected, receive))
        answer = await route.handler(server, call, threads.control if route.controls else threads.infer)
        return await unless_left(receive, answer.answer) if isinstance(answer, Later) else answer

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            answer: Answer | Stream = await answered(scope, receive)
        except Refusal as refusal:
            answer = error_answer(str(refusal), refusal.code.http)
        except ConnectionError:
            return
        except asyncio.CancelledError:  # by the door, which closes
            answer = error_answer("the server ends, and this request was not done in time", Code.UNAVAILABLE.http)
        except Exception as error:  # the edge of the server: one request fails, the others go on
            log.exception("%s %s failed", scope["method"], scope["path"])
            answer = error_answer(f"internal error: {type(error).__name__}: {error}", Code.INTERNAL.http)
        await (send_answer(send, answer) if isinstance(answer, Answer) else send_stream(send, receive, answer))

    return app


def _call(match: re.Match[str], headers: dict[bytes, bytes], body: bytes, max_bytes: int, left: Any) -> Call:
    named = match.groupdict()
    version = named.get("version")
    if version is not None and len(version) > _LONGEST_NUMBER:
        raise Refusal(f"failed to get model version from specified version string '{version[:40]}'")
    return Call(headers, body, max_bytes, named.get("model", ""), None if version is None else int(version), left)


def _header_length(call: Call, size: int) -> int:
    """Where the JSON ends: the whole body, unless the header says less."""
    said = call.headers.get(_HEADER_LENGTH)
    if said is None:
        return size
    said = said.strip()
    if not said.removeprefix(b"-").isdigit() or len(said) > _LONGEST_NUMBER:
        raise Refusal(f"Unable to parse Inference-Header-Content-Length, got: {said.decode('latin-1')}")
    if not 0 <= (length := int(said)) <= size:
        raise Refusal(f"inference header size should be in range (0, {size}), got: {length}")
    return length
