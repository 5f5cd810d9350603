"""Flags that are tritonserver's and not ours; imported by the command line, so nothing is imported here."""

from __future__ import annotations

NOT_DONE = {  # tritonserver's flags that are taken and change nothing here, and what they would do
    "--trace-config": "tracing",
    "--cache-config": "the response cache",
    "--rate-limit": "the rate limiter",
    "--rate-limit-resource": "the rate limiter",
    "--pinned-memory-pool-byte-size": "pools of pinned memory",
    "--cuda-memory-pool-byte-size": "pools of CUDA memory",
    "--host-policy": "host policies",
    "--backend-config": "settings of backends",
    "--backend-directory": "other backends than its own",
    "--metrics-config": "settings of metrics",
    "--metrics-interval-ms": "metrics of the machine",
    "--allow-gpu-metrics": "metrics of the machine",
    "--allow-cpu-metrics": "metrics of the machine",
    "--buffer-manager-thread-count": "copying threads",
    "--model-load-thread-count": "loading models in parallel",
    "--grpc-infer-thread-count": "threads of gRPC, which is asynchronous here",
}
