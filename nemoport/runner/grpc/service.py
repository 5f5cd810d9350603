"""The service `inference.GRPCInferenceService`: what HTTP answers, as gRPC says it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager, suppress
from typing import Any

import grpc
from google.protobuf import json_format
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

import nemoport
from nemoport.runner.asking import ask, ask_all
from nemoport.runner.grpc.messages import message_of, parameters_from, request_from, version_from
from nemoport.runner.overrides import overrides_from
from nemoport.runner.refusal import Code, Refusal
from nemoport.runner.request import Response
from nemoport.runner.server import EXTENSIONS, Server

log = logging.getLogger(__name__)

_LONGEST_MESSAGE = 4000  # characters: a status travels in a header, whose size clients limit
_MOST_UNDER_WAY = 1024  # requests of one stream
_FINAL, _WANTS_FINAL = "triton_final_response", "triton_enable_empty_final_response"

Method = Callable[..., Awaitable[Any]]


def answering(method: Method) -> Method:
    """A refusal becomes the status of the call."""

    async def call(self: Inference, request: Any, context: Any) -> Any:
        try:
            return await method(self, request)
        except Refusal as refusal:
            await context.abort(grpc.StatusCode[refusal.code.grpc], str(refusal)[:_LONGEST_MESSAGE])
        except Exception as error:  # the edge of the server: one request fails, the others go on
            log.exception("%s failed", method.__name__)
            await context.abort(grpc.StatusCode.INTERNAL, f"internal error: {type(error).__name__}: {error}")

    return call


class Inference(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    def __init__(self, server: Server, threads: Executor) -> None:
        self._server, self._threads = server, threads

    @answering
    async def ServerLive(self, request: Any) -> Any:
        return pb.ServerLiveResponse(live=True)

    @answering
    async def ServerReady(self, request: Any) -> Any:
        return pb.ServerReadyResponse(ready=self._server.ready())

    @answering
    async def ServerMetadata(self, request: Any) -> Any:
        return pb.ServerMetadataResponse(name="nemoport", version=nemoport.__version__, extensions=EXTENSIONS)

    @answering
    async def ModelReady(self, request: Any) -> Any:
        version = version_from(request.version)
        try:
            self._server.find(request.name, version)
        except Refusal:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=True)

    @answering
    async def ModelMetadata(self, request: Any) -> Any:
        found = self._server.metadata(request.name, version_from(request.version))
        return json_format.ParseDict(found, pb.ModelMetadataResponse())

    @answering
    async def ModelConfig(self, request: Any) -> Any:
        return pb.ModelConfigResponse(config=self._server.find(request.name, version_from(request.version)).config)

    @answering
    async def ModelStatistics(self, request: Any) -> Any:
        rows = self._server.statistics(request.name, version_from(request.version))
        return json_format.ParseDict({"model_stats": rows}, pb.ModelStatisticsResponse())

    @answering
    async def RepositoryIndex(self, request: Any) -> Any:
        rows = await self._in_thread(self._server.index, request.ready)
        return json_format.ParseDict({"models": rows}, pb.RepositoryIndexResponse())

    @answering
    async def RepositoryModelLoad(self, request: Any) -> Any:
        self._server.check_control()
        given = overrides_from(request.model_name, parameters_from(request.parameters))
        await self._in_thread(self._server.load, request.model_name, given)
        return pb.RepositoryModelLoadResponse()

    @answering
    async def RepositoryModelUnload(self, request: Any) -> Any:
        self._server.check_control()
        await self._in_thread(self._server.unload, request.model_name)
        return pb.RepositoryModelUnloadResponse()

    @answering
    async def LogSettings(self, request: Any) -> Any:
        asked = {name: getattr(value, value.WhichOneof("parameter_choice")) for name, value in request.settings.items()}
        answer = pb.LogSettingsResponse()
        for name, value in self._server.log_settings.update(asked).items():
            kind = {bool: "bool_param", int: "uint32_param", str: "string_param"}[type(value)]
            setattr(answer.settings[name], kind, value)
        return answer

    @answering
    async def ModelInfer(self, request: Any) -> Any:
        model = self._server.find(request.model_name, version_from(request.model_version))
        if model.decoupled:
            raise Refusal("ModelInfer RPC doesn't support models with decoupled transaction policy", Code.UNSUPPORTED)
        return message_of(await ask(model, request_from(request)))

    async def ModelStreamInfer(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        """Errors are messages, and the stream goes on. Answers come in the order of requests, but for decoupled
        models, whose answers come when they are there."""
        outgoing: asyncio.Queue[Any] = asyncio.Queue()
        reader = asyncio.create_task(self._read(requests, outgoing))
        try:
            while (message := await outgoing.get()) is not None:
                yield message
        finally:
            reader.cancel()
            with suppress(asyncio.CancelledError):
                await reader

    async def _read(self, requests: AsyncIterator[Any], outgoing: asyncio.Queue[Any]) -> None:
        slots = asyncio.Semaphore(_MOST_UNDER_WAY)
        before: asyncio.Task[None] | None = None
        try:
            async with asyncio.TaskGroup() as tasks:
                async for request in requests:
                    await slots.acquire()
                    if self._is_decoupled(request):
                        task = tasks.create_task(self._answer_all(request, outgoing))
                    else:
                        before = task = tasks.create_task(self._answer(request, before, outgoing))
                    task.add_done_callback(lambda _: slots.release())
        finally:
            outgoing.put_nowait(None)

    def _is_decoupled(self, request: Any) -> bool:
        try:
            return self._server.find(request.model_name, version_from(request.model_version)).decoupled
        except Refusal:
            return False

    async def _answer(self, request: Any, before: asyncio.Task[None] | None, outgoing: asyncio.Queue[Any]) -> None:
        with _told(request, []) as messages:
            model = self._server.find(request.model_name, version_from(request.model_version))
            async for response in ask_all(model, request_from(request)):
                messages += _streamed(request, response)
        if before is not None:
            await asyncio.wait([before])
        for message in messages:
            outgoing.put_nowait(message)

    async def _answer_all(self, request: Any, outgoing: asyncio.Queue[Any]) -> None:
        with _told(request, []) as messages:
            model = self._server.find(request.model_name, version_from(request.model_version))
            async for response in ask_all(model, request_from(request)):
                for message in _streamed(request, response):
                    outgoing.put_nowait(message)
        for message in messages:
            outgoing.put_nowait(message)

    async def _in_thread(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)


@contextmanager
def _told(request: Any, messages: list[Any]) -> Iterator[list[Any]]:
    """The messages to send, to which what goes wrong in the block is added."""
    try:
        yield messages
    except Refusal as refusal:
        messages.append(_refused(request, refusal))
    except Exception as error:  # the edge of the server: one request fails, the others go on
        log.exception("a request of a stream failed")
        messages.append(_refused(request, Refusal(f"internal error: {type(error).__name__}: {error}")))


def _streamed(request: Any, response: Response) -> list[Any]:
    """A message, or none: the end alone is told only to those who ask for it."""
    if isinstance(response.content, Refusal):
        message = _refused(request, response.content)
        message.infer_response.model_name = request.model_name
    elif response.content is not None:
        message = pb.ModelStreamInferResponse(infer_response=message_of(response.content))
    elif _WANTS_FINAL in request.parameters and request.parameters[_WANTS_FINAL].bool_param:
        asked = {"model_name": request.model_name, "model_version": request.model_version, "id": request.id}
        message = pb.ModelStreamInferResponse(infer_response=pb.ModelInferResponse(**asked))
    else:
        return []
    message.infer_response.parameters[_FINAL].bool_param = response.last
    return [message]


def _refused(request: Any, refusal: Refusal) -> Any:
    """The response names the request, so that a client of many knows which failed."""
    return pb.ModelStreamInferResponse(
        error_message=str(refusal)[:_LONGEST_MESSAGE], infer_response=pb.ModelInferResponse(id=request.id)
    )


def _without(name: str) -> Method:
    async def refuse(self: Inference, request: Any) -> Any:
        raise Refusal(f"{name} is not done by this server, and its extension is not advertised", Code.UNSUPPORTED)

    return answering(refuse)


for _kind in ("SystemSharedMemory", "CudaSharedMemory"):
    for _verb in ("Status", "Register", "Unregister"):
        setattr(Inference, _kind + _verb, _without(_kind + _verb))
setattr(Inference, "TraceSetting", _without("TraceSetting"))  # noqa: B010  like its neighbours
