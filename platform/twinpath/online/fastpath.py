"""From a replica's HTTP server straight to its graph.

Serve wraps each request of an ingress replica in contexts, tasks and records that cost more than
a small graph does. It also lets a function name middleware for its HTTP servers, those of replicas
included: ours, the outermost, takes predictions before Serve's wrapper sees them. What others rely
on stays true: the count of ongoing requests (drain, load), Serve's request metrics, request ids,
the bound of the queue, and rows of a client that hung up are not run. Every other request, and
every one in a setting that Serve must see to itself (``max_queued_requests``, request timeouts, a
root path, user code in a thread of its own), goes Serve's way.

It reads private names of the Ray version that this project is pinned to; where one is missing,
requests go Serve's way too.
"""

import time
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from twinpath.online.app import GraphApp

_TIMEOUT_HEADER = b"x-request-timeout-seconds"


def middlewares() -> list[Any]:
    """What RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names; called where an HTTP server starts."""
    from starlette.middleware import Middleware

    return [Middleware(FastPath)]


class FastPath:
    """ASGI middleware around ``Replica._direct_ingress_asgi``; passes all on around a proxy."""

    def __init__(self, app: ASGIApp) -> None:
        self._serve = app
        self._replica = _replica_behind(app)
        self._graph: GraphApp | None = None
        self._paths: frozenset[str] = frozenset()
        self._metadata: Any = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if (
            self._replica is None
            or scope["type"] != "http"
            or scope["method"] != "POST"
            or not self._takes(scope)
        ):
            await self._serve(scope, receive, send)
            return
        assert self._graph is not None
        path = scope["path"]
        metrics = self._replica._metrics_manager
        metrics.inc_num_ongoing_requests(self._metadata)
        started_s = time.perf_counter()
        status = 500
        try:
            status = await self._graph.predict(
                scope, receive, send, echo_request_id=True, abandoned=_hung_up(receive)
            )
        finally:
            metrics.dec_num_ongoing_requests(self._metadata)
            self._record(path, status, (time.perf_counter() - started_s) * 1000)

    def _takes(self, scope: Scope) -> bool:
        replica = self._replica
        if self._graph is None and not self._find_graph():
            return False
        return (
            scope["path"] in self._paths
            and not scope.get("root_path")
            and replica.max_queued_requests == -1
            and not replica._http_options.request_timeout_s
            and not any(name == _TIMEOUT_HEADER for name, _ in scope["headers"])
        )

    def _find_graph(self) -> bool:
        """The graph's app, once it exists; the replica is left to Serve if it serves no graph."""
        from ray.serve._private.common import RequestMetadata, RequestProtocol

        replica = self._replica
        wrapper = replica._user_callable_wrapper
        if wrapper._run_user_code_in_separate_thread:
            return False
        graph = getattr(wrapper._callable, "_asgi_app", None)
        if not isinstance(graph, GraphApp):
            return False
        prefix = (replica._route_prefix or "").rstrip("/")
        self._paths = frozenset(prefix + path for path in graph.predict_paths)
        self._metadata = RequestMetadata(
            request_id="", internal_request_id="", is_direct_ingress=True,
            _request_protocol=RequestProtocol.HTTP,
        )  # fmt: skip
        self._graph = graph
        return True

    def _record(self, path: str, status: int, latency_ms: float) -> None:
        from ray.serve._private.common import RequestProtocol

        replica, failed = self._replica, status >= 500
        replica._metrics_manager.record_request_metrics(
            route=path, latency_ms=latency_ms, is_error=failed,
            exception_type=str(status) if failed else None,
        )  # fmt: skip
        replica._metrics_manager.record_ingress_request_metrics(
            protocol=RequestProtocol.HTTP, method="POST", route=path,
            app_name=replica._deployment_id.app_name,
            deployment_name=replica._deployment_id.name,
            latency_ms=latency_ms, is_error=status >= 400, status_code=str(status),
        )  # fmt: skip


def _replica_behind(app: Any) -> Any:
    """The replica whose bound method the middlewares end at; None around anything else."""
    while hasattr(app, "_app"):
        app = app._app
    replica = getattr(app, "__self__", None)
    known = ("_metrics_manager", "_user_callable_wrapper", "_deployment_id", "max_queued_requests")
    return replica if all(hasattr(replica, name) for name in known) else None


def _hung_up(receive: Receive) -> Any:
    """Asks uvicorn's request whether its client is gone; no task has to wait for that."""
    cycle: Any = getattr(receive, "__self__", None)
    return (lambda: cycle.disconnected) if hasattr(cycle, "disconnected") else None
