"""The doors of the server: each is opened on the one event loop, and closed when it ends."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import uvicorn
from starlette.types import ASGIApp

from nemoport.errors import MachineError
from nemoport.runner.http.protocol import Protocol as HttpProtocol
from nemoport.runner.http.protocol import Watch
from nemoport.runner.server import Server
from nemoport.runner.threads import Threads

_IDLE_CONNECTION_SECONDS = 600  # clients keep pools of connections, and do not expect one to close under them
_LARGEST_MESSAGE = 2**31 - 1  # of gRPC; its own default is 4 MiB
_GRPC_THREADS = 8  # for calls that have large messages
_GRPC_OPTIONS = (
    ("grpc.max_send_message_length", _LARGEST_MESSAGE),
    ("grpc.max_receive_message_length", _LARGEST_MESSAGE),
    ("grpc.so_reuseport", 0),
)


class Endpoint(Protocol):
    name: str

    async def open(self) -> str:
        """The `host:port` that it listens at."""

    async def close(self, seconds: float) -> None:
        """Take no more requests, and let those under way finish within so many seconds."""


class _Uvicorn(uvicorn.Server):
    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
        return nullcontext()  # whoever runs the loop hears them


@dataclass
class HttpEndpoint:
    name: str
    app: ASGIApp
    listener: socket.socket
    """Bound."""
    _server: _Uvicorn | None = None
    _task: asyncio.Task[None] | None = None

    async def open(self) -> str:
        config = uvicorn.Config(
            self.app,
            http=partial(HttpProtocol, Watch()),  # type: ignore[arg-type]  # uvicorn only calls it
            proxy_headers=False,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=_IDLE_CONNECTION_SECONDS,
        )
        self._server = _Uvicorn(config)
        self._task = asyncio.create_task(self._server.serve([self.listener]))
        while not self._server.started:
            if self._task.done():
                await self._task
                raise MachineError(f"{self.name} at {address(self.listener)} did not start; see the log")
            await asyncio.sleep(0.002)
        return address(self.listener)

    async def close(self, seconds: float) -> None:
        assert self._server is not None
        assert self._task is not None
        self._server.config.timeout_graceful_shutdown = max(int(seconds), 1)  # then it cancels what is under way
        self._server.should_exit = True
        await self._task


@dataclass
class GrpcEndpoint:
    server: Server
    host: str
    port: int
    control: Executor
    name: str = "GRPCInferenceService"

    async def open(self) -> str:
        from nemoport.runner.grpc.calls import CallServer
        from nemoport.runner.grpc.service import methods

        self._threads = ThreadPoolExecutor(_GRPC_THREADS, thread_name_prefix="grpc")
        pools = Threads(self._threads, self.control)
        host = f"[{self.host}]" if ":" in self.host else self.host
        self._calls = CallServer(f"{host}:{self.port}", methods(self.server, pools), _GRPC_OPTIONS)
        if not self._calls.port:
            raise MachineError(f"cannot serve gRPC at {host}:{self.port}; choose another --grpc-port")
        return f"{host}:{self._calls.port}"

    async def close(self, seconds: float) -> None:
        await asyncio.to_thread(self._calls.close, seconds)
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)


async def run(
    endpoints: list[Endpoint], opened: Callable[[dict[str, str]], None], end: asyncio.Event, seconds: float
) -> None:
    """Until `end`. `opened` is told the addresses by name."""
    open_ones: list[Endpoint] = []
    addresses = {}
    try:
        for endpoint in endpoints:
            addresses[endpoint.name] = await endpoint.open()
            open_ones.append(endpoint)
        opened(addresses)
        await end.wait()
    finally:
        await asyncio.gather(*(endpoint.close(seconds) for endpoint in open_ones))


@contextmanager
def bound(what: str, host: str, port: int) -> Iterator[socket.socket]:
    """Bound and not yet listening: a port that is taken is known before the models load."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise _taken(what, host, port, error) from None
        yield listener


def check_free(what: str, host: str, port: int) -> None:
    """For a door that binds by itself, later."""
    with bound(what, host, port):
        return


def _taken(what: str, host: str, port: int, error: Exception) -> MachineError:
    option = f"--{what.lower()}-port"
    return MachineError(f"cannot serve {what} at {host}:{port}: {error}; choose another {option}")


def address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"{host}:{port}"
