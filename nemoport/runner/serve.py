"""The server as a process, or as a thread of one: sockets, threads and signals."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from nemoport.errors import UsageError
from nemoport.runner.ending import Limit
from nemoport.runner.endpoints import Endpoint, GrpcEndpoint, HttpEndpoint, bound, check_free, run
from nemoport.runner.flags import LACKING
from nemoport.runner.gpu_metrics import gpus
from nemoport.runner.http.app import application
from nemoport.runner.log_settings import LogSettings
from nemoport.runner.metrics import metrics_application, metrics_config
from nemoport.runner.model import LoadOptions
from nemoport.runner.polling import polling
from nemoport.runner.refusal import Refusal
from nemoport.runner.server import Server, start
from nemoport.runner.threads import threads

log = logging.getLogger(__name__)

DEFAULT_MAX_INPUT_SIZE = 64 * 2**20
_M_ARENA_MAX = -8  # of malloc.h
_LOOP = uvicorn.Config(lambda *_: None).get_loop_factory()  # uvloop's where it is installed


@dataclass(frozen=True)
class ServeOptions:
    """tritonserver's flags, under their names. Sizes are bytes."""

    model_repository: tuple[Path, ...]
    id: str = "nemoport"
    allow_http: bool = True
    http_address: str = "0.0.0.0"  # noqa: S104  tritonserver's default
    http_port: int = 8000
    http_thread_count: int = 8
    http_max_input_size: int = DEFAULT_MAX_INPUT_SIZE
    allow_grpc: bool = True
    grpc_address: str = "0.0.0.0"  # noqa: S104  as above
    grpc_port: int = 8001
    allow_metrics: bool = True
    metrics_address: str = ""
    """As --http-address, when it is not given."""
    metrics_port: int = 8002
    metrics_config: tuple[str, ...] = ()
    allow_gpu_metrics: bool = True
    metrics_interval_ms: float = 2000.0
    model_control_mode: str = "none"
    repository_poll_secs: int = 15
    load_model: tuple[str, ...] = ()
    model_config_name: str = ""
    disable_auto_complete_config: bool = False
    strict_readiness: bool = True
    exit_on_error: bool = True
    exit_timeout_secs: int = 30
    log_verbose: int = 0
    log_info: bool = True
    log_warning: bool = True
    log_error: bool = True
    log_format: str = "default"
    log_file: Path | None = None
    allow_cpu_fallback: bool = False
    not_done: tuple[str, ...] = ()
    """Flags of LACKING that were given."""
    admit: Callable[[Path], None] | None = None
    """Refuses, by an error, a model's directory that may not be loaded."""


def check_options(options: ServeOptions) -> None:
    mode = options.model_control_mode
    if mode not in ("none", "explicit", "poll"):
        raise UsageError(f"--model-control-mode={mode} is none of none, explicit and poll")
    if mode == "poll" and options.repository_poll_secs < 1:
        raise UsageError(f"--repository-poll-secs={options.repository_poll_secs} must be at least 1")
    if options.load_model and mode != "explicit":
        raise UsageError("--load-model needs --model-control-mode=explicit")
    if "*" in options.load_model and len(options.load_model) > 1:
        raise UsageError("--load-model=* loads every model; give it alone")
    if not (options.allow_http or options.allow_grpc):
        raise UsageError("neither HTTP nor gRPC is allowed, nobody could ask; leave one of them on")
    metrics_config(options.metrics_config)
    if not options.metrics_interval_ms >= 0:
        raise UsageError(f"--metrics-interval-ms={options.metrics_interval_ms} must be at least 0")
    if not options.model_repository:
        raise UsageError("no --model-repository is given; name at least one")


def load_models(options: ServeOptions) -> Server:
    """The server that the options describe, with its models loaded and no socket open."""
    check_options(options)
    return start(
        options.model_repository,
        LoadOptions(
            options.model_config_name,
            options.disable_auto_complete_config,
            options.allow_cpu_fallback,
            options.admit,
        ),
        explicit=options.model_control_mode == "explicit",
        load_model=options.load_model,
        exit_on_error=options.exit_on_error,
        strict_readiness=options.strict_readiness,
        name=options.id,
        log_settings=_log_settings(options),
    )


def serve(options: ServeOptions) -> None:
    """Load the models, answer until SIGINT or SIGTERM, let requests under way finish, return; where that takes longer
    than the limit, the process exits with 1, as tritonserver does."""
    check_options(options)
    _share_one_arena()
    _start_log(options.log_file)
    for flag in options.not_done:
        log.warning("%s is accepted and changes nothing: this server does not have %s", flag, LACKING[flag])
    with ExitStack() as stack:
        listener = None
        if options.allow_http:
            listener = stack.enter_context(bound("HTTP", options.http_address, options.http_port))
        measured = None
        if options.allow_metrics:
            at = options.metrics_address or options.http_address
            measured = stack.enter_context(bound("metrics", at, options.metrics_port))
        if options.allow_grpc:
            check_free("gRPC", options.grpc_address, options.grpc_port)
        server = load_models(options)
        limit = stack.enter_context(Limit(options.exit_timeout_secs, server.under_way))
        pools = stack.enter_context(threads(options.http_thread_count))
        endpoints: list[Endpoint] = []
        if listener:
            app = application(server, pools, options.http_max_input_size)
            endpoints.append(HttpEndpoint("HTTPService", app, listener))
        if measured:
            asked = stack.enter_context(gpus(options.metrics_interval_ms)) if options.allow_gpu_metrics else None
            told = metrics_application(server, metrics_config(options.metrics_config), asked)
            endpoints.append(HttpEndpoint("Metrics Service", told, measured))
        if options.allow_grpc:
            endpoints.append(GrpcEndpoint(server, options.grpc_address, options.grpc_port, pools.control))
        if options.model_control_mode == "poll":
            stack.enter_context(polling(server, options.repository_poll_secs))
        with asyncio.Runner(loop_factory=_LOOP) as runner:
            runner.run(_until_signalled(endpoints, limit))
        server.close()


async def _until_signalled(endpoints: list[Endpoint], limit: Limit) -> None:
    end, loop = asyncio.Event(), asyncio.get_running_loop()

    def ends() -> None:
        limit.begin()
        end.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ends)
    await run(endpoints, _log_addresses, end, limit.seconds)


def _log_addresses(addresses: dict[str, str]) -> None:
    for name, at in addresses.items():
        log.info("Started %s at %s", name, at)


@dataclass(frozen=True)
class Addresses:
    """`host:port` of each."""

    http: str
    grpc: str
    metrics: str = ""


@contextmanager
def serving(
    server: Server,
    http_port: int = 0,
    http_address: str = "127.0.0.1",
    http_max_input_size: int = DEFAULT_MAX_INPUT_SIZE,
    http_thread_count: int = 4,
) -> Iterator[str]:
    """Answer HTTP from a thread of this process, at the `host:port` that is given; port 0 takes a free one."""
    with bound("HTTP", http_address, http_port) as listener, threads(http_thread_count) as pools:
        http = HttpEndpoint("HTTPService", application(server, pools, http_max_input_size), listener)
        with _in_thread([http]) as addresses:
            yield addresses[http.name]


@contextmanager
def serving_all(server: Server, http_max_input_size: int = DEFAULT_MAX_INPUT_SIZE) -> Iterator[Addresses]:
    """Answer at every door of 127.0.0.1, on free ports, from a thread of this process."""
    with ExitStack() as stack:
        pools = stack.enter_context(threads(4))
        doors = [stack.enter_context(bound("HTTP", "127.0.0.1", 0)) for _ in range(2)]
        http = HttpEndpoint("HTTPService", application(server, pools, http_max_input_size), doors[0])
        metrics = HttpEndpoint("Metrics Service", metrics_application(server), doors[1])
        grpc = GrpcEndpoint(server, "127.0.0.1", 0, pools.control)
        addresses = stack.enter_context(_in_thread([http, grpc, metrics]))
        yield Addresses(addresses[http.name], addresses[grpc.name], addresses[metrics.name])


@contextmanager
def _in_thread(endpoints: list[Endpoint], seconds: float = 5) -> Iterator[dict[str, str]]:
    addresses: Future[dict[str, str]] = Future()
    ending: list[Callable[[], object]] = []

    async def main() -> None:
        end, loop = asyncio.Event(), asyncio.get_running_loop()
        ending.append(lambda: loop.call_soon_threadsafe(end.set))
        await run(endpoints, addresses.set_result, end, seconds)

    def work() -> None:
        try:
            with asyncio.Runner(loop_factory=_LOOP) as runner:
                runner.run(main())
        except BaseException as error:
            if addresses.done():
                raise
            addresses.set_exception(error)

    thread = threading.Thread(target=work, name="endpoints")
    thread.start()
    try:
        yield addresses.result()
    finally:
        if not addresses.exception():
            ending[0]()
        thread.join()


def _share_one_arena() -> None:
    """glibc gives threads heaps of their own, from which what large requests leave behind does not come back: after a
    hundred thousand hostile ones a process with eight heaps holds twice as much, and it grows. Elsewhere nothing."""
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_ARENA_MAX, 1)


def _start_log(file: Path | None) -> None:
    logging.basicConfig(filename=file, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s] %(message)s")


def _log_settings(options: ServeOptions) -> LogSettings:
    names = ("log_verbose", "log_info", "log_warning", "log_error", "log_format")
    asked = {name: getattr(options, name) for name in names}
    asked["log_verbose_level"] = asked.pop("log_verbose")
    settings = LogSettings(str(options.log_file or ""))
    try:
        settings.update(asked)
    except Refusal as refusal:
        raise UsageError(str(refusal)) from None
    return settings
