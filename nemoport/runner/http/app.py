"""The endpoints as a table, and the ASGI application that looks them up."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass

from starlette.types import ASGIApp, Receive, Scope, Send

import nemoport
from nemoport.runner.contract import raw_input
from nemoport.runner.http.exchange import (
    BINARY,
    JSON,
    Answer,
    Call,
    error_answer,
    json_answer,
    read_body,
    send_answer,
    unpacked,
)
from nemoport.runner.http.wire import RAW_FORM, format_response, parse_json, parse_request
from nemoport.runner.refusal import Code, Refusal
from nemoport.runner.request import InferRequest
from nemoport.runner.server import Server

log = logging.getLogger(__name__)

EXTENSIONS = ("model_repository", "model_configuration", "binary_tensor_data", "parameters")
_HEADER_LENGTH = b"inference-header-content-length"
_LONGEST_VERSION = 19  # digits of 2^63


def live(server: Server, call: Call) -> Answer:
    return Answer()


def ready(server: Server, call: Call) -> Answer:
    return Answer(200 if server.ready() else 400)


def server_metadata(server: Server, call: Call) -> Answer:
    return json_answer({"name": "nemoport", "version": nemoport.__version__, "extensions": EXTENSIONS})


def model_metadata(server: Server, call: Call) -> Answer:
    return json_answer(server.metadata(call.model, call.version))


def model_ready(server: Server, call: Call) -> Answer:
    try:
        server.find(call.model, call.version)
    except Refusal:
        return error_answer("Model version not ready", 400)
    return Answer()


def model_config(server: Server, call: Call) -> Answer:
    return json_answer(server.find(call.model, call.version).config_json())


def infer(server: Server, call: Call) -> Answer:
    target = server.find(call.model, call.version)
    body = unpacked(call)
    header_length = _header_length(call, len(body))
    if header_length == 0 and _HEADER_LENGTH in call.headers:
        request, form = InferRequest((raw_input(body, target.contract),)), RAW_FORM
    else:
        request, form = parse_request(body, header_length, call.model)
    content, json_length = format_response(target.infer(request), form)
    if json_length is None:
        return Answer(200, content, (JSON,))
    return Answer(200, content, (BINARY, (_HEADER_LENGTH, b"%d" % json_length)))


def repository_index(server: Server, call: Call) -> Answer:
    only_ready = parse_json(unpacked(call)).get("ready", False)
    if not isinstance(only_ready, bool):
        raise Refusal("Invalid value for 'ready': expected a boolean")
    return json_answer([row for row in server.index() if not only_ready or row.get("state") == "READY"])


def load(server: Server, call: Call) -> Answer:
    _check_control(server)
    if parse_json(unpacked(call)).get("parameters"):
        raise Refusal("load parameters are not supported by this server, change the files and load again")
    server.load(call.model)
    return Answer()


def unload(server: Server, call: Call) -> Answer:
    _check_control(server)
    parse_json(unpacked(call))
    server.unload(call.model)
    return Answer()


@dataclass(frozen=True)
class Route:
    """`waits` marks a handler that computes or reads files, which goes to a thread."""

    pattern: re.Pattern[str]
    method: str
    handler: Callable[[Server, Call], Answer]
    waits: bool = False


_MODEL = r"/v2/models/(?P<model>[^/]+)(?:/versions/(?P<version>[0-9]+))?"
ROUTES = (
    Route(re.compile(_MODEL + "/infer"), "POST", infer, waits=True),
    Route(re.compile("/v2/health/live"), "GET", live),
    Route(re.compile("/v2/health/ready"), "GET", ready),
    Route(re.compile("/v2"), "GET", server_metadata),
    Route(re.compile(_MODEL + "/ready"), "GET", model_ready),
    Route(re.compile(_MODEL + "/config"), "GET", model_config),
    Route(re.compile(_MODEL), "GET", model_metadata),
    Route(re.compile("/v2/repository/index"), "POST", repository_index, waits=True),
    Route(re.compile("/v2/repository/models/(?P<model>[^/]+)/load"), "POST", load, waits=True),
    Route(re.compile("/v2/repository/models/(?P<model>[^/]+)/unload"), "POST", unload, waits=True),
)


def application(server: Server, threads: Executor, max_bytes: int) -> ASGIApp:
    """`max_bytes` bounds the body of a request."""

    async def answered(scope: Scope, receive: Receive) -> Answer:
        for route in ROUTES:
            if match := route.pattern.fullmatch(scope["path"]):
                break
        else:
            return error_answer("Not Found", 404)
        if scope["method"] != route.method:
            return error_answer("Method Not Allowed", 405)
        headers = dict(scope["headers"])
        body = await read_body(receive, max_bytes)
        call = _call(match, headers, body, max_bytes)
        if not route.waits:
            return route.handler(server, call)
        return await asyncio.get_running_loop().run_in_executor(threads, route.handler, server, call)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            answer = await answered(scope, receive)
        except Refusal as refusal:
            answer = error_answer(str(refusal), refusal.code.value)
        except ConnectionError:
            return
        except Exception as error:  # the edge of the server: one request fails, the others go on
            log.exception("%s %s failed", scope["method"], scope["path"])
            answer = error_answer(f"internal error: {type(error).__name__}: {error}", Code.INTERNAL.value)
        await send_answer(send, answer)

    return app


def _call(match: re.Match[str], headers: dict[bytes, bytes], body: bytes, max_bytes: int) -> Call:
    named = match.groupdict()
    version = named.get("version")
    if version is not None and len(version) > _LONGEST_VERSION:
        raise Refusal(f"failed to get model version from specified version string '{version[:40]}'")
    return Call(headers, body, max_bytes, named.get("model", ""), None if version is None else int(version))


def _header_length(call: Call, size: int) -> int:
    """Where the JSON ends: the whole body, unless the header says less."""
    text = call.headers.get(_HEADER_LENGTH)
    if text is None:
        return size
    said = text.decode("latin-1").strip()
    if not said.removeprefix("-").isdecimal() or len(said) > 19:
        raise Refusal(f"Unable to parse Inference-Header-Content-Length, got: {said}")
    if not 0 <= int(said) <= size:
        raise Refusal(f"inference header size should be in range (0, {size}), got: {said}")
    return int(said)


def _check_control(server: Server) -> None:
    if not server.explicit:
        raise Refusal(
            "explicit model load / unload is not allowed if polling is enabled; "
            "start the server with --model-control-mode=explicit",
            Code.UNAVAILABLE,
        )
