"""From a replica's HTTP server straight to its graph.

Serve wraps each request of an ingress replica in contexts, tasks and records that cost more than
a small graph does. It also lets a function name middleware for its HTTP servers, those of replicas
included: ours, the outermost, opens a door through which `lean.LeanProtocol` takes inference
requests before ASGI. What others rely on stays true: the count of ongoing requests (drain, load),
Serve's request metrics, request ids, the bound of the queue, and rows of a client that hung up are
not run. Every other request, and every one in a setting that Serve must see to itself
(``max_queued_requests``, request timeouts, a root path, user code in a thread of its own), goes
Serve's way.

It reads private names of the Ray version that this project is pinned to; where one is missing,
requests go Serve's way too.
"""

import math
import time
from collections.abc import Mapping
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from twinpath.online import pins
from twinpath.online.app import GraphApp
from twinpath.online.exchange import Answer, Codec, Request
from twinpath.online.frontend import Frontend
from twinpath.online.lean import LeanCycle
from twinpath.online.serve_metrics import ServeMetrics
from twinpath.online.slow_bodies import SlowBodies

_TIMEOUT_HEADER = b"x-request-timeout-seconds"


def middlewares() -> list[Any]:
    """What RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names; called where an HTTP server starts,
    before it chooses its protocol."""
    from starlette.middleware import Middleware
    from uvicorn.config import HTTP_PROTOCOLS

    HTTP_PROTOCOLS["auto"] = "twinpath.online.lean:LeanProtocol"
    return [Middleware(FastPath)]


class FastPath:
    """ASGI middleware around ``Replica._direct_ingress_asgi``, which passes every request on; its
    ``door`` takes those that need not come here."""

    def __init__(self, app: ASGIApp) -> None:
        self._serve = app
        replica = _replica_behind(app)
        self.door = None if replica is None else ReplicaDoor(replica)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        door = self.door
        if door is not None and scope["type"] == "http" and door.may_stream(scope):
            await door.stream(scope, receive, send)
            return
        await self._serve(scope, receive, send)


class ReplicaDoor:
    """`lean.Door` of one ingress replica."""

    def __init__(self, replica: Any) -> None:
        self._replica = replica
        self.slow_bodies = SlowBodies(self)
        self._frontend: Frontend | None = None
        self._codecs: dict[bytes, Codec] = {}
        self._metrics: ServeMetrics | None = None
        self._graph: GraphApp | None = None
        self._prefix = ""
        self._pinnable = False

    @property
    def max_body_bytes(self) -> int:
        """See `lean.Door`."""
        return 0 if self._frontend is None else self._frontend.max_body_bytes

    @property
    def body_timeout_s(self) -> float:
        """See `lean.Door`."""
        if self._frontend is None and not self._find_graph():
            return math.inf
        assert self._frontend is not None
        return self._frontend.body_timeout_s

    def codec(self, url: bytes, headers: Mapping[bytes, bytes]) -> Codec | None:
        """See `lean.Door`."""
        if self._frontend is None and not self._find_graph():
            return None
        codec = self._codecs.get(url)
        if codec is None and b"?" in url:
            codec = self._codecs.get(url.partition(b"?")[0])
        if codec is None and self._pinnable:
            codec = pins.at_raw(self._codecs, url.partition(b"?")[0])
        return None if codec is None or self._is_serves(headers) else codec

    def _is_serves(self, headers: Mapping[bytes, bytes]) -> bool:
        """Whether Serve, or the app's own middleware, has to see to a request."""
        replica = self._replica
        return bool(
            _TIMEOUT_HEADER in headers
            or (b"origin" in headers and self._frontend is not None and self._frontend.cors)
            or replica.max_queued_requests != -1
            or replica._http_options.request_timeout_s
            or replica._http_options.root_path
        )

    def may_stream(self, scope: Scope) -> bool:
        """Whether a request is the OpenAI API's, and nothing of Serve's is needed for it."""
        if scope["method"] != "POST" or (self._frontend is None and not self._find_graph()):
            return False
        door = None if self._graph is None else self._graph.openai
        path: str = scope["path"]
        return (
            door is not None
            and path.startswith(self._prefix)
            and door.takes("POST", path[len(self._prefix) :])
            and not self._is_serves(dict(scope["headers"]))
        )

    async def stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer such a request, with Serve's counts kept."""
        graph, metrics = self._graph, self._metrics
        assert graph is not None
        assert graph.openai is not None
        assert metrics is not None
        scope = {**scope, "root_path": self._prefix}
        started_s, status = time.monotonic(), 499
        metrics.began()
        try:
            status = await graph.openai(scope, receive, send, echo_request_id=True, cancels=False)
        finally:
            metrics.ended(
                scope["path"], str(status), (time.monotonic() - started_s) * 1000,
                refused=status >= 400, failed=status >= 500,
            )  # fmt: skip

    def enter(self, cycle: LeanCycle) -> None:
        """See `lean.Door`."""
        frontend = self._frontend
        metrics = self._metrics
        assert frontend is not None
        assert metrics is not None
        metrics.began()
        path, _, query = cycle.url.partition(b"?")
        text = path.decode("latin-1")
        peer = cycle.protocol.client
        ask = frontend.ask(text, cycle.headers, len(cycle.body), peer[0] if peer else "")

        def reply(answer: Answer) -> None:
            status = answer.status
            metrics.ended(
                text, str(status), (time.monotonic() - ask.started_s) * 1000,
                refused=status >= 400, failed=status >= 500,
            )  # fmt: skip
            answer.headers.append((b"x-request-id", ask.request_id))
            cycle.reply(answer)

        request = Request(text, query, cycle.headers, bytes(cycle.body))
        exchange = frontend.begin(cycle.codec, request, ask, reply)
        if not cycle.response_complete:
            cycle.exchange = exchange

    def _find_graph(self) -> bool:
        replica = self._replica
        graph = graph_of(replica)
        if graph is None:
            return False
        prefix = (replica._route_prefix or "").rstrip("/")
        self._metrics = ServeMetrics(replica)
        self._codecs = {
            (prefix + path).encode(): codec for path, codec in graph.frontend.codecs.items()
        }
        self._graph, self._prefix = graph, prefix
        self._pinnable = graph.frontend.plane.pinnable
        self._frontend = graph.frontend
        return True


def graph_of(replica: Any) -> GraphApp | None:
    """The app of the graph that a replica serves, once it exists; None for any other app, and
    where user code runs in a thread of its own."""
    wrapper = replica._user_callable_wrapper
    if wrapper._run_user_code_in_separate_thread:
        return None
    graph = getattr(wrapper._callable, "_asgi_app", None)
    return graph if isinstance(graph, GraphApp) else None


def is_replica(candidate: Any) -> bool:
    """Whether it has every private name of Serve's replica that is read."""
    known = ("_metrics_manager", "_user_callable_wrapper", "_deployment_id", "max_queued_requests")
    return all(hasattr(candidate, name) for name in known)


def _replica_behind(app: Any) -> Any:
    """The replica whose bound method the middlewares end at; None around anything else."""
    while hasattr(app, "_app"):
        app = app._app
    replica = getattr(app, "__self__", None)
    return replica if is_replica(replica) else None
