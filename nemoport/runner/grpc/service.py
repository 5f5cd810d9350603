"""The service `inference.GRPCInferenceService`: what HTTP answers, as gRPC says it.

Calls are answered by threads and not on an event loop: grpcio's own does half as many calls in a second.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf import json_format
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

import nemoport
from nemoport.runner.asking import ask_and_wait
from nemoport.runner.grpc.messages import message_of, parameters_from, request_from, shortened, version_from
from nemoport.runner.grpc.streaming import conversation
from nemoport.runner.overrides import overrides_from
from nemoport.runner.refusal import Code, Refusal
from nemoport.runner.server import EXTENSIONS, Server

log = logging.getLogger(__name__)

Method = Callable[..., Any]


def answering(method: Method) -> Method:
    """A refusal becomes the status of the call."""

    def call(self: Inference, request: Any, context: Any) -> Any:
        try:
            return method(self, request, context)
        except Refusal as refusal:
            context.abort(grpc.StatusCode[refusal.code.grpc], shortened(refusal))
        except Exception as error:  # the edge of the server: one request fails, the others go on
            log.exception("%s failed", method.__name__)
            ours = Refusal(f"internal error: {type(error).__name__}: {error}", Code.INTERNAL)
            context.abort(grpc.StatusCode.INTERNAL, shortened(ours))

    return call


class Inference(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    def __init__(self, server: Server) -> None:
        self._server = server

    @answering
    def ServerLive(self, request: Any, context: Any) -> Any:
        return pb.ServerLiveResponse(live=True)

    @answering
    def ServerReady(self, request: Any, context: Any) -> Any:
        return pb.ServerReadyResponse(ready=self._server.ready())

    @answering
    def ServerMetadata(self, request: Any, context: Any) -> Any:
        return pb.ServerMetadataResponse(name=self._server.name, version=nemoport.__version__, extensions=EXTENSIONS)

    @answering
    def ModelReady(self, request: Any, context: Any) -> Any:
        version = version_from(request.version)
        try:
            self._server.find(request.name, version)
        except Refusal:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=True)

    @answering
    def ModelMetadata(self, request: Any, context: Any) -> Any:
        found = self._server.metadata(request.name, version_from(request.version))
        return json_format.ParseDict(found, pb.ModelMetadataResponse())

    @answering
    def ModelConfig(self, request: Any, context: Any) -> Any:
        return pb.ModelConfigResponse(config=self._server.find(request.name, version_from(request.version)).config)

    @answering
    def ModelStatistics(self, request: Any, context: Any) -> Any:
        rows = self._server.statistics(request.name, version_from(request.version))
        return json_format.ParseDict({"model_stats": rows}, pb.ModelStatisticsResponse())

    @answering
    def RepositoryIndex(self, request: Any, context: Any) -> Any:
        rows = self._server.index(request.ready)
        return json_format.ParseDict({"models": rows}, pb.RepositoryIndexResponse())

    @answering
    def RepositoryModelLoad(self, request: Any, context: Any) -> Any:
        self._server.check_control()
        given = overrides_from(request.model_name, parameters_from(request.parameters))
        self._server.load(request.model_name, given)
        return pb.RepositoryModelLoadResponse()

    @answering
    def RepositoryModelUnload(self, request: Any, context: Any) -> Any:
        self._server.check_control()
        self._server.unload(request.model_name)
        return pb.RepositoryModelUnloadResponse()

    @answering
    def LogSettings(self, request: Any, context: Any) -> Any:
        asked = {name: getattr(value, value.WhichOneof("parameter_choice")) for name, value in request.settings.items()}
        answer = pb.LogSettingsResponse()
        for name, value in self._server.log_settings.update(asked).items():
            kind = {bool: "bool_param", int: "uint32_param", str: "string_param"}[type(value)]
            setattr(answer.settings[name], kind, value)
        return answer

    @answering
    def ModelInfer(self, request: Any, context: Any) -> Any:
        model = self._server.find(request.model_name, version_from(request.model_version))
        if model.decoupled:
            raise Refusal("ModelInfer RPC doesn't support models with decoupled transaction policy", Code.UNSUPPORTED)
        return message_of(ask_and_wait(model, request_from(request), context.add_callback))

    def ModelStreamInfer(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        return conversation(self._server, requests, context)


def _without(name: str) -> Method:
    def refuse(self: Inference, request: Any, context: Any) -> Any:
        raise Refusal(f"{name} is not done by this server, and its extension is not advertised", Code.UNSUPPORTED)

    return answering(refuse)


for _kind in ("SystemSharedMemory", "CudaSharedMemory"):
    for _verb in ("Status", "Register", "Unregister"):
        setattr(Inference, _kind + _verb, _without(_kind + _verb))
setattr(Inference, "TraceSetting", _without("TraceSetting"))  # noqa: B010  like its neighbours


def add_inference(server: Server, to: Any, waiting: ThreadPoolExecutor) -> None:
    """Calls that may wait for a model, or for a client, have threads of their own."""
    service = Inference(server)
    for name in ("ModelInfer", "ModelStreamInfer", "RepositoryModelLoad", "RepositoryModelUnload"):
        setattr(service, name, _In(waiting, getattr(service, name)))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(service, to)


@dataclass(frozen=True)
class _In:
    """A method whose calls grpc gives to this pool."""

    experimental_thread_pool: ThreadPoolExecutor
    method: Method

    def __call__(self, request: Any, context: Any) -> Any:
        return self.method(request, context)
