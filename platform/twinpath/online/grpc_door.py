"""gRPC straight to a replica's graph, as `fastpath` does it for HTTP.

Serve starts a gRPC server in each ingress replica, and calls the functions that its option
``grpc_servicer_functions`` names with it: name ``twinpath.online.grpc_door:add_to_server``. Serve
would route each method through the same wrapper as HTTP requests; it lets services pass through
untouched, though, as it does for reflection, and so does this. Where the server is Serve's proxy,
and in settings that Serve must see to itself, methods go Serve's way to `replicas.Ingress`.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from grpc_health.v1 import health_pb2, health_pb2_grpc

from twinpath.online.fastpath import graph_of, is_replica
from twinpath.online.oip_service import SERVICE, OipService, service_handlers
from twinpath.online.serve_metrics import ServeMetrics

HEALTH = "grpc.health.v1.Health"
#: gRPC codes that are the server's fault.
_FAILURES = ("INTERNAL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "UNKNOWN")


def add_to_server(servicer: Any, server: Any) -> None:
    """Serve's hook. ``servicer`` is Serve's stand-in and not used."""
    replica = getattr(getattr(server, "service_handler_factory", None), "__self__", None)
    direct = is_replica(replica) and hasattr(server, "add_passthrough_service")
    if replica is not None and direct and not _serve_must_see(replica):
        server.add_passthrough_service(SERVICE)
        server.add_passthrough_service(HEALTH)
        door = GrpcDoor(replica)
        server.add_generic_rpc_handlers((service_handlers(door.find, door.counted),))
        health_pb2_grpc.add_HealthServicer_to_server(_Health(door), server)
    else:
        server.add_generic_rpc_handlers((service_handlers(lambda: None, contextlib.nullcontext),))


class GrpcDoor:
    """The service of one ingress replica, and Serve's account of its calls."""

    def __init__(self, replica: Any) -> None:
        self._replica = replica
        self._service: OipService | None = None
        self._metrics: ServeMetrics | None = None

    def find(self) -> OipService | None:
        """The service, once the graph is set up."""
        if self._service is None:
            graph = graph_of(self._replica)
            if graph is not None:
                self._service = OipService(graph.frontend)
        return self._service

    @contextlib.contextmanager
    def counted(self, method: str) -> Iterator[Callable[[str], None]]:
        """A call of a method runs; what it yields is told the gRPC status at its end."""
        if self._metrics is None:
            self._metrics = ServeMetrics(self._replica, "GRPC", "")
        metrics, started_s = self._metrics, time.monotonic()
        code = ""

        def record(status: str) -> None:
            nonlocal code
            code = status

        metrics.began()
        try:
            yield record
        except Exception:
            code = code or "UNKNOWN"  # what gRPC answers then
            raise
        finally:
            code = code or "CANCELLED"
            metrics.ended(
                method, code, (time.monotonic() - started_s) * 1000,
                refused=code != "OK", failed=code in _FAILURES,
            )  # fmt: skip


class _Health(health_pb2_grpc.HealthServicer):
    """The standard health service: serving when rows can be run."""

    def __init__(self, door: GrpcDoor) -> None:
        self._door = door

    async def Check(self, request: Any, context: Any) -> Any:
        """grpc.health.v1.Health/Check."""
        import grpc

        service = self._door.find()
        if request.service not in ("", SERVICE):
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service!r} here")
        ready = service is not None and not await service.plane.ready()
        states = health_pb2.HealthCheckResponse
        return states(status=states.SERVING if ready else states.NOT_SERVING)


def _serve_must_see(replica: Any) -> bool:
    options = getattr(replica, "_grpc_options", None)
    return replica.max_queued_requests != -1 or bool(getattr(options, "request_timeout_s", None))
