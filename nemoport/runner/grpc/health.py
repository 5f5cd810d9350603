"""The service grpc.health.v1.Health, as load balancers and Kubernetes ask it."""

from __future__ import annotations

from typing import Any

from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

from nemoport.runner.server import Server


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Whatever service is named, it is as ready as the server."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def Check(self, request: Any, context: Any) -> Any:
        state = health_pb2.HealthCheckResponse
        return state(status=state.SERVING if self._server.ready() else state.NOT_SERVING)


def add_health(server: Server, to: Any) -> None:
    health_pb2_grpc.add_HealthServicer_to_server(Health(server), to)
