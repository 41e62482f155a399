"""The short way to the graph: what it takes, what it leaves to Serve, and what it keeps true."""

import asyncio
import json
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import BaseModel

from twinpath import Columns, Graph, Node
from twinpath.graph.placement import Batch
from twinpath.graph.stage import Executor
from twinpath.online.app import GraphApp
from twinpath.online.batcher import Batcher

pytest.importorskip("ray.serve")
from twinpath.online.fastpath import FastPath, middlewares


class Number(BaseModel):
    x: float


class Double(Node):
    inputs, outputs = {"x": "float64"}, {"x": "float64"}

    def predict(self, columns: Columns) -> Columns:
        return {"x": columns["x"] * 2}


class Replica:
    """The part of Serve's replica that the fast path reads."""

    def __init__(self, graph_app: GraphApp, prefix: str = "/double") -> None:
        self._metrics_manager = SimpleNamespace(
            inc_num_ongoing_requests=lambda _: self.count("inc"),
            dec_num_ongoing_requests=lambda _: self.count("dec"),
            record_request_metrics=lambda **_: self.count("requests"),
            record_ingress_request_metrics=lambda **kw: self.count(kw["status_code"]),
        )
        self._user_callable_wrapper = SimpleNamespace(
            _run_user_code_in_separate_thread=False, _callable=SimpleNamespace(_asgi_app=graph_app)
        )
        self._deployment_id = SimpleNamespace(app_name="app", name="double")
        self._http_options = SimpleNamespace(request_timeout_s=None)
        self.max_queued_requests = -1
        self._route_prefix = prefix
        self.seen: Counter[str] = Counter()

    def count(self, what: str) -> None:
        self.seen[what] += 1

    async def _direct_ingress_asgi(self, scope: Any, receive: Any, send: Any) -> None:
        self.count("serve")
        await send({"type": "http.response.start", "status": 299, "headers": []})
        await send({"type": "http.response.body", "body": b""})


class Cycle:
    """uvicorn's side of a request: a bound ``receive``, and whether the client hung up."""

    def __init__(self, body: bytes, disconnected: bool = False) -> None:
        self.body, self.disconnected = body, disconnected
        self.sent: list[dict[str, Any]] = []

    async def receive(self) -> dict[str, Any]:
        return {"type": "http.request", "body": self.body}

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)


def setting(prefix: str = "/double") -> tuple[Replica, FastPath, list[int]]:
    graph = Graph("double", input=Number, output=Number)
    with graph as number:
        graph.output(Double()(number))
    executor = Executor(graph.plan)
    executor.setup()
    ran: list[int] = []

    async def run(columns: Columns) -> Any:
        ran.append(len(columns["x"]))
        return await executor.run(columns)

    replica = Replica(
        GraphApp(graph.plan, Batcher(run, Batch()), 1000, echo_request_id=False), prefix
    )
    from ray.serve._private.http_util import RequestIdMiddleware

    return replica, FastPath(RequestIdMiddleware(replica._direct_ingress_asgi)), ran


def send(fast: FastPath, path: str = "/double/predict", body: Any = None, **more: Any) -> Cycle:
    given = body if isinstance(body, bytes) else json.dumps(body or {"rows": [{"x": 2}]}).encode()
    cycle = Cycle(given, more.pop("disconnected", False))
    scope = {
        "type": "http", "method": "POST", "path": path, "root_path": "", "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    } | more  # fmt: skip
    asyncio.run(fast(scope, cycle.receive, cycle.send))
    return cycle


@pytest.mark.parametrize("path", ["/double/predict", "/double/double/predict"])
def test_a_prediction_does_not_pass_serve_and_is_counted(path: str):
    replica, fast, _ = setting()
    start, body = send(fast, path, headers=[(b"x-request-id", b"mine")]).sent
    assert start["status"] == 200
    assert json.loads(body["body"]) == {"rows": [{"x": 4.0}]}
    assert (b"x-request-id", b"mine") in start["headers"]
    assert replica.seen == {"inc": 1, "dec": 1, "requests": 1, "200": 1}


def test_at_the_root_there_is_no_prefix():
    replica, fast, _ = setting(prefix="/")
    assert send(fast, "/predict").sent[0]["status"] == 200
    assert not replica.seen["serve"]


def test_a_refused_request_is_counted_as_what_it_is():
    replica, fast, _ = setting()
    assert send(fast, body=b"{").sent[0]["status"] == 400
    assert replica.seen == {"inc": 1, "dec": 1, "requests": 1, "400": 1}


@pytest.mark.parametrize(
    "more",
    [
        {"method": "GET"},
        {"path": "/double/healthz"},
        {"path": "/other/predict"},
        {"root_path": "/behind"},
        {"headers": [(b"x-request-timeout-seconds", b"3")]},
    ],
)
def test_everything_else_goes_serves_way(more: dict[str, Any]):
    replica, fast, ran = setting()
    assert send(fast, **more).sent[0]["status"] == 299
    assert replica.seen == {"serve": 1}
    assert ran == []


@pytest.mark.parametrize("setting_of_serve", ["queue", "timeout", "thread", "other app"])
def test_what_serve_must_see_to_itself_is_left_to_it(setting_of_serve: str):
    replica, fast, _ = setting()
    match setting_of_serve:
        case "queue":
            replica.max_queued_requests = 10
        case "timeout":
            replica._http_options.request_timeout_s = 5.0
        case "thread":
            replica._user_callable_wrapper._run_user_code_in_separate_thread = True
        case "other app":
            replica._user_callable_wrapper._callable._asgi_app = object()
    assert send(fast).sent[0]["status"] == 299


def test_rows_of_a_client_that_hung_up_are_not_run():
    replica, fast, ran = setting()
    send(fast, disconnected=True)
    assert ran == []
    assert replica.seen == {"inc": 1, "dec": 1, "requests": 1, "499": 1}


def test_around_a_proxy_it_passes_everything_on():
    passed = []

    async def proxy(scope: Any, receive: Any, send: Any) -> None:
        passed.append(scope["path"])

    send(FastPath(proxy))
    assert passed == ["/double/predict"]


def test_serve_is_given_one_middleware():
    [middleware] = middlewares()
    assert middleware.cls is FastPath


def test_the_replica_of_this_ray_has_every_name_that_is_read():
    from ray.serve._private import replica

    source = {name for part in (replica.Replica,) for name in dir(part)}
    assert {"max_queued_requests", "_direct_ingress_asgi"} <= source
    for name in ("inc_num_ongoing_requests", "dec_num_ongoing_requests", "record_request_metrics",
                 "record_ingress_request_metrics"):  # fmt: skip
        assert callable(getattr(replica.ReplicaMetricsManager, name))
