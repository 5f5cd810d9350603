"""The service grpc.health.v1.Health, as load balancers and Kubernetes ask it."""

from __future__ import annotations

from typing import Any

from grpc_health.v1 import health_pb2  # type: ignore[import-untyped]

from nemoport.runner.server import Server

PATH, Request = "/grpc.health.v1.Health/Check", health_pb2.HealthCheckRequest


def check(server: Server, request: Any) -> Any:
    """Whatever service is named, it is as ready as the server."""
    state = health_pb2.HealthCheckResponse
    return state(status=state.SERVING if server.ready() else state.NOT_SERVING)
