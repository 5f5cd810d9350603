"""The server as a process, or as a thread of one: sockets, threads and signals."""

from __future__ import annotations

import logging
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from nemoport.errors import MachineError, UsageError
from nemoport.runner.http.app import application
from nemoport.runner.model import LoadOptions
from nemoport.runner.server import Server, start

log = logging.getLogger(__name__)

DEFAULT_MAX_INPUT_SIZE = 64 * 2**20
_IDLE_CONNECTION_SECONDS = 600  # clients keep pools of connections, and do not expect one to close under them


@dataclass(frozen=True)
class ServeOptions:
    """tritonserver's flags, under their names. Sizes are bytes."""

    model_repository: tuple[Path, ...]
    http_address: str = "0.0.0.0"  # noqa: S104  tritonserver's default
    http_port: int = 8000
    http_thread_count: int = 8
    http_max_input_size: int = DEFAULT_MAX_INPUT_SIZE
    model_control_mode: str = "none"
    load_model: tuple[str, ...] = ()
    model_config_name: str = ""
    disable_auto_complete_config: bool = False
    strict_readiness: bool = True
    exit_on_error: bool = True
    exit_timeout_secs: int = 30
    log_verbose: int = 0
    allow_cpu_fallback: bool = False


def check_options(options: ServeOptions) -> None:
    mode = options.model_control_mode
    if mode not in ("none", "explicit"):
        raise UsageError(f"--model-control-mode={mode} is not done by this server; use none or explicit")
    if options.load_model and mode != "explicit":
        raise UsageError("--load-model needs --model-control-mode=explicit")
    if "*" in options.load_model and len(options.load_model) > 1:
        raise UsageError("--load-model=* loads every model; give it alone")
    if not options.model_repository:
        raise UsageError("no --model-repository is given; name at least one")


def load_models(options: ServeOptions) -> Server:
    """The server that the options describe, with its models loaded and no socket open."""
    check_options(options)
    return start(
        options.model_repository,
        LoadOptions(options.model_config_name, options.disable_auto_complete_config, options.allow_cpu_fallback),
        explicit=options.model_control_mode == "explicit",
        load_model=options.load_model,
        exit_on_error=options.exit_on_error,
        strict_readiness=options.strict_readiness,
    )


def serve(options: ServeOptions) -> None:
    """Load the models, answer until SIGINT or SIGTERM, let requests under way finish, return."""
    _log_to_stderr(options.log_verbose)
    check_options(options)
    with _bound(options.http_address, options.http_port) as listener:
        server = load_models(options)
        with _threads(options.http_thread_count) as threads:
            http = _http(server, threads, options.http_max_input_size, options.exit_timeout_secs)
            listener.listen()
            log.info("Started HTTPService at %s", _address(listener))
            with _ended_by_signals(http):
                http.run([listener])


@contextmanager
def serving(
    server: Server,
    http_port: int = 0,
    http_address: str = "127.0.0.1",
    http_max_input_size: int = DEFAULT_MAX_INPUT_SIZE,
    http_thread_count: int = 4,
) -> Iterator[str]:
    """Answer from a thread of this process, at the `host:port` that is given; port 0 takes a free one."""
    with _bound(http_address, http_port) as listener, _threads(http_thread_count) as threads:
        http = _http(server, threads, http_max_input_size, exit_timeout_secs=5)
        thread = threading.Thread(target=http.run, args=([listener],), name="http")
        thread.start()
        try:
            while not http.started:
                if not thread.is_alive():
                    raise MachineError(f"the HTTP server at {_address(listener)} did not start; see the log")
                time.sleep(0.002)
            yield _address(listener)
        finally:
            http.should_exit = True
            thread.join()


def _http(server: Server, threads: ThreadPoolExecutor, max_input_size: int, exit_timeout_secs: int) -> uvicorn.Server:
    return uvicorn.Server(
        uvicorn.Config(
            application(server, threads, max_input_size),
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=_IDLE_CONNECTION_SECONDS,
            timeout_graceful_shutdown=exit_timeout_secs,
        )
    )


def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="infer")


@contextmanager
def _bound(address: str, port: int) -> Iterator[socket.socket]:
    """Bound and not yet listening: a port that is taken is known before the models load."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((address, port))
        except OSError as error:
            raise MachineError(f"cannot serve HTTP at {address}:{port}: {error}; choose another --http-port") from None
        yield listener


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"{host}:{port}"


@contextmanager
def _ended_by_signals(http: uvicorn.Server) -> Iterator[None]:
    """uvicorn ends on these while it runs, and then raises them again; this is for before and after."""

    def end(*_: object) -> None:
        http.should_exit = True

    before: dict[signal.Signals, Any] = {
        number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _log_to_stderr(verbose: int) -> None:
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO, format="%(asctime)s %(levelname)s %(name)s] %(message)s"
    )
