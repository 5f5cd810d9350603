"""Counters of every model version in Prometheus' text format, under Triton's names.

Written here and not by a client library: those name every counter `..._total`, and Triton does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from starlette.types import ASGIApp, Receive, Scope, Send

from nemoport.runner.http.exchange import Answer, error_answer, send_answer
from nemoport.runner.server import Server
from nemoport.runner.statistics import Failure, Statistics

_TEXT = (b"content-type", b"text/plain; charset=utf-8")


@dataclass(frozen=True)
class Metric:
    name: str
    kind: str
    help: str
    value: Callable[[Statistics], int]


def _count(name: str) -> Callable[[Statistics], int]:
    return lambda statistics: statistics.requests[name].count


def _microseconds(name: str) -> Callable[[Statistics], int]:
    return lambda statistics: statistics.requests[name].ns // 1000


METRICS = (
    Metric(
        "nv_inference_request_success",
        "counter",
        "Number of successful inference requests, all batch sizes",
        _count("success"),
    ),
    Metric(
        "nv_inference_count",
        "counter",
        "Number of inferences performed (does not include cached requests)",
        lambda statistics: statistics.inference_count,
    ),
    Metric(
        "nv_inference_exec_count",
        "counter",
        "Number of model executions performed (does not include cached requests)",
        lambda statistics: statistics.execution_count,
    ),
    *(
        Metric(f"nv_inference_{name}_duration_us", "counter", f"Cumulative inference {words} in microseconds", value)
        for name, words, value in (
            ("request", "request duration", _microseconds("success")),
            ("queue", "queuing duration", _microseconds("queue")),
            ("compute_input", "compute input duration", _microseconds("compute_input")),
            ("compute_infer", "compute inference duration", _microseconds("compute_infer")),
            ("compute_output", "compute output duration", _microseconds("compute_output")),
        )
    ),
    Metric(
        "nv_inference_pending_request_count",
        "gauge",
        "Instantaneous number of pending requests awaiting execution per-model.",
        lambda statistics: statistics.pending,
    ),
)
_FAILURE = "nv_inference_request_failure"


def exposition(server: Server) -> str:
    return "".join(f"{line}\n" for line in _lines(server))


def _lines(server: Server) -> Iterator[str]:
    versions = [(f'model="{_escaped(name)}"', f'version="{number}"', of) for name, number, of in server.counted()]
    for metric in METRICS:
        yield from _head(metric.name, metric.kind, metric.help)
        for model, version, statistics in versions:
            yield f"{metric.name}{{{model},{version}}} {metric.value(statistics)}"
    yield from _head(_FAILURE, "counter", "Number of failed inference requests, all batch sizes")
    for model, version, statistics in versions:
        for reason in Failure:
            yield f'{_FAILURE}{{{model},reason="{reason.value}",{version}}} {statistics.failures[reason]}'


def _head(name: str, kind: str, text: str) -> tuple[str, str]:
    return f"# HELP {name} {text}", f"# TYPE {name} {kind}"


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def metrics_application(server: Server) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] != "/metrics":
            await send_answer(send, error_answer("Not Found", 404))
        elif scope["method"] != "GET":
            await send_answer(send, error_answer("Method Not Allowed", 405))
        else:
            await send_answer(send, Answer(200, exposition(server).encode(), (_TEXT,)))

    return app
