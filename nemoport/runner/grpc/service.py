"""The service `inference.GRPCInferenceService`: what HTTP answers, as gRPC says it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
from google.protobuf import json_format
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2 as pb

import nemoport
from nemoport.runner.grpc import health
from nemoport.runner.grpc.calls import Call, Method
from nemoport.runner.grpc.messages import message_of, parameters_from, request_from, shortened, version_from
from nemoport.runner.grpc.streaming import converse
from nemoport.runner.overrides import overrides_from
from nemoport.runner.refusal import Code, Refusal
from nemoport.runner.request import Response
from nemoport.runner.server import EXTENSIONS, Server
from nemoport.runner.threads import Threads

log = logging.getLogger(__name__)

_SMALL = 2**18  # bytes of a message that is read in less time than a thread takes to wake
_NEVER = -1
Hear = Callable[[Server, Call, bytes], None]
"""Begins to answer the one message of a call."""


def server_live(server: Server, request: Any) -> Any:
    return pb.ServerLiveResponse(live=True)


def server_ready(server: Server, request: Any) -> Any:
    return pb.ServerReadyResponse(ready=server.ready())


def server_metadata(server: Server, request: Any) -> Any:
    return pb.ServerMetadataResponse(name=server.name, version=nemoport.__version__, extensions=EXTENSIONS)


def model_ready(server: Server, request: Any) -> Any:
    version = version_from(request.version)
    try:
        server.find(request.name, version)
    except Refusal:
        return pb.ModelReadyResponse(ready=False)
    return pb.ModelReadyResponse(ready=True)


def model_metadata(server: Server, request: Any) -> Any:
    found = server.metadata(request.name, version_from(request.version))
    return json_format.ParseDict(found, pb.ModelMetadataResponse())


def model_config(server: Server, request: Any) -> Any:
    return pb.ModelConfigResponse(config=server.find(request.name, version_from(request.version)).config)


def model_statistics(server: Server, request: Any) -> Any:
    rows = server.statistics(request.name, version_from(request.version))
    return json_format.ParseDict({"model_stats": rows}, pb.ModelStatisticsResponse())


def repository_index(server: Server, request: Any) -> Any:
    rows = server.index(request.ready)
    return json_format.ParseDict({"models": rows}, pb.RepositoryIndexResponse())


def repository_model_load(server: Server, request: Any) -> Any:
    server.check_control()
    given = overrides_from(request.model_name, parameters_from(request.parameters))
    server.load(request.model_name, given)
    return pb.RepositoryModelLoadResponse()


def repository_model_unload(server: Server, request: Any) -> Any:
    server.check_control()
    asked = parameters_from(request.parameters).get("unload_dependents")
    server.unload(request.model_name, with_members=asked is True)
    return pb.RepositoryModelUnloadResponse()


def log_settings(server: Server, request: Any) -> Any:
    asked = {name: getattr(value, value.WhichOneof("parameter_choice")) for name, value in request.settings.items()}
    answer = pb.LogSettingsResponse()
    for name, value in server.log_settings.update(asked).items():
        kind = {bool: "bool_param", int: "uint32_param", str: "string_param"}[type(value)]
        setattr(answer.settings[name], kind, value)
    return answer


def infer(server: Server, call: Call, content: bytes) -> None:
    request = pb.ModelInferRequest.FromString(content)
    model = server.find(request.model_name, version_from(request.model_version))
    if model.decoupled:
        raise Refusal("ModelInfer RPC doesn't support models with decoupled transaction policy", Code.UNSUPPORTED)
    job = model.submit(request_from(request), partial(_inferred, call), call.when_idle)
    call.when_left(job.cancel)


def _inferred(call: Call, response: Response) -> None:
    """On the thread of an instance, or of a quick job on the one that polls."""
    _guarded(call, _answer_inferred, call, response)


def _answer_inferred(call: Call, response: Response) -> None:
    call.answer(message_of(response.value()).SerializeToString())


def _guarded(call: Call, work: Callable[..., object], *given: Any) -> None:
    """A refusal becomes the status of the call."""
    try:
        work(*given)
    except Refusal as refusal:
        call.end(grpc.StatusCode[refusal.code.grpc], shortened(refusal))
    except DecodeError:
        call.end(grpc.StatusCode.INTERNAL, "Exception deserializing request!")
    except Exception as error:  # the edge of the server: one request fails, the others go on
        log.exception("a call failed")
        ours = Refusal(f"internal error: {type(error).__name__}: {error}", Code.INTERNAL)
        call.end(grpc.StatusCode.INTERNAL, shortened(ours))


def _answer(kind: Any, answer: Callable[[Server, Any], Any]) -> Hear:
    """Of a function from message to message."""

    def hear(server: Server, call: Call, content: bytes) -> None:
        call.answer(answer(server, kind.FromString(content)).SerializeToString())

    return hear


def _without(name: str) -> Hear:
    def hear(server: Server, call: Call, content: bytes) -> None:
        raise Refusal(f"{name} is not done by this server, and its extension is not advertised", Code.UNSUPPORTED)

    return hear


@dataclass(frozen=True)
class Row:
    """`here` is how many bytes a message may have to be answered on the thread that polls, and not in another."""

    name: str
    hear: Hear
    here: int = _SMALL


_LACKING = (
    *(f"{kind}SharedMemory{verb}" for kind in ("System", "Cuda") for verb in ("Status", "Register", "Unregister")),
    "TraceSetting",
)
ROWS = (
    Row("ModelInfer", infer),
    Row("ServerLive", _answer(pb.ServerLiveRequest, server_live)),
    Row("ServerReady", _answer(pb.ServerReadyRequest, server_ready)),
    Row("ServerMetadata", _answer(pb.ServerMetadataRequest, server_metadata)),
    Row("ModelReady", _answer(pb.ModelReadyRequest, model_ready)),
    Row("ModelMetadata", _answer(pb.ModelMetadataRequest, model_metadata)),
    Row("ModelConfig", _answer(pb.ModelConfigRequest, model_config)),
    Row("ModelStatistics", _answer(pb.ModelStatisticsRequest, model_statistics)),
    Row("LogSettings", _answer(pb.LogSettingsRequest, log_settings)),
    Row("RepositoryIndex", _answer(pb.RepositoryIndexRequest, repository_index), _NEVER),
    Row("RepositoryModelLoad", _answer(pb.RepositoryModelLoadRequest, repository_model_load), _NEVER),
    Row("RepositoryModelUnload", _answer(pb.RepositoryModelUnloadRequest, repository_model_unload), _NEVER),
    *(Row(name, _without(name)) for name in _LACKING),
)


def methods(server: Server, threads: Threads) -> dict[bytes, Method]:
    """Of the service, by the path of a call; `threads` for what waits or is large."""
    path = "/inference.GRPCInferenceService/{}"
    found = {path.format(row.name): partial(_unary, server, threads, row) for row in ROWS}
    found[path.format("ModelStreamInfer")] = partial(converse, server)
    found[health.PATH] = partial(_unary, server, threads, Row("Check", _answer(health.Request, health.check)))
    return {name.encode(): method for name, method in found.items()}


def _unary(server: Server, threads: Threads, row: Row, call: Call) -> None:
    def answer(content: bytes) -> None:
        _guarded(call, row.hear, server, call, content)

    def heard(content: bytes | None) -> None:
        if content is None:
            call.end(grpc.StatusCode.UNIMPLEMENTED, f"{row.name} requires exactly one request message.")
        elif len(content) <= row.here:
            answer(content)
        else:
            call.when_idle = None  # it is heard by another thread, which reads nothing
            (threads.control if row.here == _NEVER else threads.infer).submit(answer, content)

    call.receive(heard)
