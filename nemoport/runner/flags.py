"""The flags of `serve`: tritonserver's, under its names and in its groups, and a few of our own.

Imported by the command line, so nothing heavy is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = {"integer": int, "number": float, "boolean": bool, "string": str, "path": Path, "flag": bool}


@dataclass(frozen=True)
class Flag:
    """One row. Where `lacks` says something, the flag is accepted and changes nothing, and a warning tells so."""

    name: str
    kind: str = "string"
    default: Any = None
    help: str = ""
    also: str = ""
    many: bool = False
    lacks: str = ""

    @property
    def option(self) -> str:
        """Its name in ServeOptions."""
        return self.name.removeprefix("--").replace("-", "_")


def _lacking(what: str, *names: str) -> tuple[Flag, ...]:
    return tuple(Flag(f"--{name}", many=True, lacks=what) for name in names)


_TLS = "TLS; put a proxy in front"
_KEEPALIVE = "settings of gRPC connections"
FLAGS: dict[str, tuple[Flag, ...]] = {
    "Server": (
        Flag("--id", default="nemoport", help="The name of this server in GET /v2."),
        Flag("--exit-timeout-secs", "integer", 30, "Seconds that the end may take; then the process exits with 1."),
    ),
    "Logging": (
        Flag("--log-verbose", "integer", 0, "0 turns verbose messages off."),
        Flag("--log-info", "boolean", True),
        Flag("--log-warning", "boolean", True),
        Flag("--log-error", "boolean", True),
        Flag("--log-format", default="default", help="default or ISO8601."),
        Flag("--log-file", "path", None, "Where messages go in place of stderr."),
    ),
    "Model Repository": (
        Flag("--model-repository", "path", (), "A repository of models; repeatable.", also="--model-store", many=True),
        Flag("--exit-on-error", "boolean", True, "End when a model fails to load at the start."),
        Flag("--disable-auto-complete-config", "flag", False, "Configs must be complete; nothing comes from models."),
        Flag("--strict-readiness", "boolean", True, "Ready only when every model is."),
        Flag("--model-control-mode", default="none", help="none, explicit or poll."),
        Flag("--repository-poll-secs", "integer", 15, "Under poll control, how often to look."),
        Flag("--load-model", default=(), help="Under explicit control; repeatable, * alone loads all.", many=True),
        Flag("--require-verified", "flag", False, "Load only what is byte for byte as published; not Triton's."),
        Flag("--key", "path", (), "A public key that must have signed; repeatable; not Triton's.", many=True),
        Flag("--model-config-name", default="", help="Use configs/NAME.pbtxt of a model that has one."),
        *_lacking("a number of threads for loads; each has its own", "model-load-thread-count"),
        *_lacking("loading again what failed to load", "model-load-retry-count"),
        *_lacking("namespaces of models", "model-namespacing"),
        *_lacking("peer access of GPUs", "enable-peer-access"),
    ),
    "HTTP": (
        Flag("--allow-http", "boolean", True),
        Flag("--http-address", default="0.0.0.0"),  # noqa: S104  tritonserver's default
        Flag("--http-port", "integer", 8000),
        Flag("--http-thread-count", "integer", 8, "Threads that read and write large requests."),
        Flag("--http-max-input-size", "integer", 64 * 2**20, "Bytes of the largest request."),
        *_lacking("ports that are shared", "reuse-http-port"),
        *_lacking("headers as parameters", "http-header-forward-pattern"),
        *_lacking("restricted APIs; put a proxy in front", "http-restricted-api"),
    ),
    "GRPC": (
        Flag("--allow-grpc", "boolean", True),
        Flag("--grpc-address", default="0.0.0.0"),  # noqa: S104  as above
        Flag("--grpc-port", "integer", 8001),
        *_lacking("ports that are shared", "reuse-grpc-port"),
        *_lacking("headers as parameters", "grpc-header-forward-pattern"),
        *_lacking("pools of allocations", "grpc-infer-allocation-pool-size", "grpc-max-response-pool-size"),
        *_lacking("a number of threads for gRPC; one reads all its calls", "grpc-infer-thread-count"),
        *_lacking(_TLS, "grpc-use-ssl", "grpc-use-ssl-mutual", "grpc-server-cert", "grpc-server-key", "grpc-root-cert"),
        *_lacking("compression of gRPC's answers", "grpc-infer-response-compression-level"),
        *_lacking(_KEEPALIVE, "grpc-keepalive-time", "grpc-keepalive-timeout", "grpc-keepalive-permit-without-calls"),
        *_lacking(_KEEPALIVE, "grpc-http2-max-pings-without-data", "grpc-http2-max-ping-strikes"),
        *_lacking(_KEEPALIVE, "grpc-http2-min-recv-ping-interval-without-data"),
        *_lacking(_KEEPALIVE, "grpc-max-connection-age", "grpc-max-connection-age-grace"),
        *_lacking("restricted APIs; put a proxy in front", "grpc-restricted-protocol"),
    ),
    "Sagemaker": _lacking(
        "SageMaker's endpoint",
        *("allow-sagemaker", "sagemaker-port", "sagemaker-safe-port-range", "sagemaker-thread-count"),
    ),
    "Vertex": _lacking(
        "Vertex AI's endpoint",
        *("allow-vertex-ai", "vertex-ai-port", "vertex-ai-thread-count", "vertex-ai-default-model"),
    ),
    "Metrics": (
        Flag("--allow-metrics", "boolean", True),
        Flag("--metrics-address", default="", help="Where it is not given, that of HTTP."),
        Flag("--metrics-port", "integer", 8002),
        Flag(
            "--metrics-config",
            default=(),
            help="summary_latencies=true adds summaries, summary_quantiles=0.5:0.05,0.99:0.001 says which; "
            "histogram_latencies=true adds times to first responses; counter_latencies=false leaves the counters of "
            "durations out; repeatable.",
            many=True,
        ),
        Flag("--allow-gpu-metrics", "boolean", True, "Metrics of GPUs, where there are some and nvidia-ml-py is."),
        Flag("--metrics-interval-ms", "number", 2000.0, "How old metrics of GPUs may be."),
        *_lacking("metrics of the CPU", "allow-cpu-metrics"),
    ),
    "Tracing": _lacking("tracing", "trace-config"),
    "Backend": (
        *_lacking("other backends than its own", "backend-directory"),
        *_lacking("settings of backends", "backend-config"),
    ),
    "Repository Agent": _lacking("repository agents", "repoagent-directory"),
    "Response Cache": _lacking("the response cache", "cache-config", "cache-directory"),
    "Rate Limiter": _lacking("the rate limiter", "rate-limit", "rate-limit-resource"),
    "Memory/Device Management": (
        Flag(
            "--allow-cpu-fallback", "flag", False, "Run KIND_GPU models on the CPU where there is no GPU; not Triton's."
        ),
        *_lacking("pools of pinned memory", "pinned-memory-pool-byte-size"),
        *_lacking("pools of CUDA memory", "cuda-memory-pool-byte-size", "cuda-virtual-address-size"),
        *_lacking("a lowest compute capability", "min-supported-compute-capability"),
        *_lacking("copying threads", "buffer-manager-thread-count"),
        *_lacking("host policies", "host-policy"),
        *_lacking("limits on GPU memory", "model-load-gpu-limit"),
        *_lacking("shared memory with clients", "allow-client-shm"),
    ),
    "DEPRECATED": (
        *_lacking("this old name; give --disable-auto-complete-config", "strict-model-config"),
        *_lacking("the response cache", "response-cache-byte-size"),
        *_lacking("tracing", "trace-file", "trace-level", "trace-rate", "trace-count", "trace-log-frequency"),
    ),
}

DONE = tuple(flag for group in FLAGS.values() for flag in group if not flag.lacks)
LACKING = {flag.name: flag.lacks for group in FLAGS.values() for flag in group if flag.lacks}
