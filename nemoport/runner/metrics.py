"""Counters of every model version, and the use of GPUs, in Prometheus' text format under Triton's names.

Written here and not by a client library: those name every counter `..._total`, and Triton does not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from nemoport.errors import UsageError
from nemoport.runner.generation.measured import ROWS
from nemoport.runner.gpu_metrics import GPU_METRICS, Gpus, Reading
from nemoport.runner.http.exchange import Answer, error_answer, send_answer
from nemoport.runner.server import Server
from nemoport.runner.statistics import FIRST_RESPONSE_MS, TIMED, Failure, Statistics

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
_FIRST = "nv_inference_first_response_histogram_ms"
_Labelled = tuple[str, str, Statistics]
"""The labels of a version, with what it did."""


@dataclass(frozen=True)
class MetricsConfig:
    """`--metrics-config`; Triton's defaults."""

    counter_latencies: bool = True
    histogram_latencies: bool = False
    summary_latencies: bool = False
    summary_quantiles: tuple[float, ...] = (0.5, 0.9, 0.95, 0.99, 0.999)


_DEFAULT = MetricsConfig()


def metrics_config(settings: Iterable[str]) -> MetricsConfig:
    """From `summary_latencies=true`, or `summary_quantiles=0.5:0.05,0.99:0.001`: quantiles and the errors allowed."""
    read: dict[str, Any] = {}
    done = _DEFAULT
    for setting in settings:
        name, _, value = setting.partition("=")
        try:
            if name == "summary_quantiles":
                read[name] = tuple(float(pair.partition(":")[0]) for pair in value.split(","))
                right = all(0 <= quantile <= 1 for quantile in read[name])
            else:
                read[name] = value == "true"
                right = name.endswith("_latencies") and value in ("true", "false")
            done = replace(_DEFAULT, **read)
        except (ValueError, TypeError):
            right = False
        if not right:
            raise UsageError(
                f"--metrics-config={setting} is no setting of metrics; there are counter_latencies, "
                "histogram_latencies and summary_latencies, true or false, and summary_quantiles=0.5:0.05,0.99:0.001"
            )
    return done


def exposition(server: Server, config: MetricsConfig = _DEFAULT, gpus: Sequence[Reading] = ()) -> str:
    return "".join(f"{line}\n" for line in (*_of_models(server, config), *_of_gpus(gpus)))


def _of_models(server: Server, config: MetricsConfig) -> Iterator[str]:
    ready = server.ready_versions()
    versions = [
        (f'model="{_escaped(name)}"', f'version="{number}"', version.statistics) for name, number, version in ready
    ]
    for metric in METRICS:
        if config.counter_latencies or not metric.name.endswith("_duration_us"):
            yield from _head(metric.name, metric.kind, metric.help)
            for model, version, statistics in versions:
                yield f"{metric.name}{{{model},{version}}} {metric.value(statistics)}"
    yield from _head(_FAILURE, "counter", "Number of failed inference requests, all batch sizes")
    for model, version, statistics in versions:
        for reason in Failure:
            yield f'{_FAILURE}{{{model},reason="{reason.value}",{version}}} {statistics.failures[reason]}'
    if config.summary_latencies:
        yield from _summaries(versions, config.summary_quantiles)
    if config.histogram_latencies:
        yield from _first_responses(versions)
    made = [
        (f'model="{_escaped(name)}",version="{number}"', version.generator.measured)
        for name, number, version in ready
        if version.generator
    ]
    for row in ROWS if made else ():
        yield from _head(row.name, row.kind, row.help)
        for labels, measured in made:
            yield from measured.lines(row, labels)


def _of_gpus(gpus: Sequence[Reading]) -> Iterator[str]:
    for metric in GPU_METRICS if gpus else ():
        yield from _head(metric.name, metric.kind, metric.help)
        for gpu in gpus:
            yield from gpu.lines(metric)


def _summaries(versions: Sequence[_Labelled], quantiles: Sequence[float]) -> Iterator[str]:
    """Over the last requests, where Triton's are over the last minute."""
    found = [(model, version, of, of.quantiles(quantiles)) for model, version, of in versions]
    for part in TIMED:
        name, counted = f"nv_inference_{part}_summary_us", "success" if part == "request" else part
        yield from _head(name, "summary", f"Summary of inference {part.replace('_', ' ')} duration in microseconds")
        for model, version, statistics, of_parts in found:
            total = statistics.requests[counted]
            yield f"{name}_count{{{model},{version}}} {total.count}"
            yield f"{name}_sum{{{model},{version}}} {total.ns // 1000}"
            for quantile, ns in zip(quantiles, of_parts[part], strict=True):
                yield f'{name}{{{model},{version},quantile="{quantile:g}"}} {ns // 1000}'


def _first_responses(versions: Sequence[_Labelled]) -> Iterator[str]:
    """The time to the first token, of models that generate."""
    yield from _head(_FIRST, "histogram", "Duration from request to first response in milliseconds")
    for model, version, statistics in versions:
        total = 0
        for at, bound in enumerate((*map(str, FIRST_RESPONSE_MS), "+Inf")):
            total += statistics.first_responses[at]
            yield f'{_FIRST}_bucket{{{model},{version},le="{bound}"}} {total}'
        yield f"{_FIRST}_count{{{model},{version}}} {total}"
        yield f"{_FIRST}_sum{{{model},{version}}} {statistics.first_response_ns // 1_000_000}"


def _head(name: str, kind: str, text: str) -> tuple[str, str]:
    return f"# HELP {name} {text}", f"# TYPE {name} {kind}"


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def metrics_application(server: Server, config: MetricsConfig = _DEFAULT, gpus: Gpus | None = None) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] != "/metrics":
            await send_answer(send, error_answer("Not Found", 404))
        elif scope["method"] != "GET":
            await send_answer(send, error_answer("Method Not Allowed", 405))
        else:
            read = await asyncio.to_thread(gpus.read) if gpus else ()
            await send_answer(send, Answer(200, exposition(server, config, read).encode(), (_TEXT,)))

    return app
