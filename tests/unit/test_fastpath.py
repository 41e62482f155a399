"""The short way to the graph: what it takes, what it leaves to Serve, and what it keeps true."""

import asyncio
import functools
import gc
import json
import math
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
import uvloop
from pydantic import BaseModel
from uvicorn.config import HTTP_PROTOCOLS
from uvicorn.importer import import_from_string
from uvicorn.server import ServerState

from twinpath import Columns, Graph, Node
from twinpath.graph.placement import Batch
from twinpath.graph.stage import Executor
from twinpath.online.app import GraphApp, graph_app
from twinpath.online.batcher import Batcher
from twinpath.online.lean import LeanProtocol

pytest.importorskip("ray.serve")
from twinpath.online.fastpath import FastPath, middlewares

EMPTY = [(b"content-length", b"0")]
ONE_REFUSED = {
    "inc": 1, "dec": 1, "requests": 1, "latency": 2, "error": 1, "deployment error": 1,
}  # fmt: skip
BODY = b'{"rows": [{"x": 2}]}'


class Number(BaseModel):
    x: float


class Double(Node):
    inputs, outputs = {"x": "float64"}, {"x": "float64"}

    def predict(self, columns: Columns) -> Columns:
        return {"x": columns["x"] * 2}


class Metric:
    """One of Serve's counters or histograms: how often it was told what, by its labels."""

    def __init__(self, count: Callable[[str], None]) -> None:
        self.count = count

    def inc(self, times: int, tags: dict[str, str]) -> None:
        for _ in range(times):
            self.count(tags.get("status_code", "requests"))

    def observe(self, value: float, tags: dict[str, str]) -> None:
        assert 0 <= value < 5000
        self.count("latency")


class Manager:
    """The part of Serve's metrics manager that is written to."""

    def __init__(self, count: Callable[[str], None]) -> None:
        self.inc_num_ongoing_requests = lambda _: count("inc")
        self.dec_num_ongoing_requests = lambda _: count("dec")
        self._user_code_time_accumulator = self._tracker = SimpleNamespace(add=lambda ms: None)
        self._max_processing_latency_trackers = defaultdict(lambda: self._tracker)
        metric = Metric(count)
        self._processing_latency_tracker = self._request_counter = self._error_counter = metric
        self._should_emit_request_ingress_metrics = lambda protocol: True
        from ray.serve._private.request_ingress_metrics import RequestIngressMetrics

        ingress = SimpleNamespace(
            request_counter=metric,
            processing_latency_tracker=metric,
            request_error_counter=Metric(lambda _: count("error")),
            deployment_request_error_counter=Metric(lambda _: count("deployment error")),
            request_tags=RequestIngressMetrics.request_tags,
            request_error_tags=RequestIngressMetrics.request_error_tags,
            deployment_error_tags=RequestIngressMetrics.deployment_error_tags,
        )
        self._ingress_metrics = defaultdict(lambda: ingress)


class Replica:
    """The part of Serve's replica that the fast path reads."""

    def __init__(self, graph_app: GraphApp, prefix: str, batcher: Batcher) -> None:
        self.app, self.batcher = graph_app, batcher
        #: Whether Serve's way leads to the app, as it does in a real replica.
        self.leads_on = False
        self._metrics_manager = Manager(self.count)
        self._user_callable_wrapper = SimpleNamespace(
            _run_user_code_in_separate_thread=False, _callable=SimpleNamespace(_asgi_app=graph_app)
        )
        self._deployment_id = SimpleNamespace(app_name="app", name="double")
        self._http_options = SimpleNamespace(request_timeout_s=None, root_path="")
        self.max_queued_requests = -1
        self._route_prefix = prefix
        self.seen: Counter[str] = Counter()

    def count(self, what: str) -> None:
        self.seen[what] += 1

    async def _direct_ingress_asgi(self, scope: Any, receive: Any, send: Any) -> None:
        self.count("serve")
        if self.leads_on:
            await self.app({**scope, "root_path": self._route_prefix}, receive, send)
            return
        await send({"type": "http.response.start", "status": 299, "headers": EMPTY})
        await send({"type": "http.response.body", "body": b""})


class Transport(asyncio.Transport):
    """A socket's other end: what was written, and whether it was closed."""

    def __init__(self) -> None:
        super().__init__({"peername": ("10.0.0.1", 5), "sockname": ("10.0.0.2", 80)})
        self.written, self.closed = b"", False

    def write(self, data: Any) -> None:
        self.written += bytes(data)

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


def setting(
    prefix: str = "/double",
    limit: int = 1000,
    wait_ms: float = 0.0,
    body_timeout_s: float = math.inf,
) -> tuple[Replica, FastPath, list[int]]:
    graph = Graph("double", input=Number, output=Number)
    with graph as number:
        graph.output(Double()(number))
    executor = Executor(graph.plan)
    executor.setup()
    ran: list[int] = []

    async def run(columns: Columns) -> Any:
        ran.append(len(columns["x"]))
        return await executor.run(columns)

    batcher = Batcher(run, Batch(max_wait_ms=wait_ms))
    app = graph_app(
        graph.plan, batcher, max_body_bytes=limit, body_timeout_s=body_timeout_s,
        echo_request_id=False,
    )  # fmt: skip
    replica = Replica(app, prefix, batcher)
    from ray.serve._private.http_util import RequestIdMiddleware

    return replica, FastPath(RequestIdMiddleware(replica._direct_ingress_asgi)), ran


def raw(path: str = "/double/predict", body: bytes = BODY, **more: Any) -> bytes:
    """A request as it comes on the wire."""
    headers = {"host": "x", "content-length": str(len(body))} | more.pop("headers", {})
    lines = [f"{more.pop('method', 'POST')} {path} HTTP/{more.pop('version', '1.1')}"]
    lines += [f"{name}: {value}" for name, value in headers.items() if value is not None]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


async def talk(
    fast: FastPath, *pieces: bytes, hang_up: bool = False, root_path: str = ""
) -> Transport:
    """Feed these pieces to a connection, one loop iteration apart; the connection's end."""
    config = uvicorn.Config(fast, lifespan="off", root_path=root_path)
    config.load()
    protocol = LeanProtocol(config, ServerState(), {}, asyncio.get_running_loop())
    transport = Transport()
    protocol.connection_made(transport)
    for piece in pieces:
        protocol.data_received(piece)
        if hang_up:
            protocol.connection_lost(None)
        await asyncio.sleep(0.01)
    protocol._unset_keepalive_if_required()
    metrics = fast.door and fast.door._metrics
    if metrics is not None:
        metrics.flush()
    return transport


def send(fast: FastPath, *pieces: bytes, **more: Any) -> list[tuple[int, dict[str, str], bytes]]:
    """Status, headers and body of each answer."""
    return answers(asyncio.run(talk(fast, *pieces, **more)).written)


def answers(written: bytes) -> list[tuple[int, dict[str, str], bytes]]:
    found = []
    while written:
        head, _, rest = written.partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        size = int(headers["content-length"])
        found.append((int(status.split()[1]), headers, rest[:size]))
        written = rest[size:]
    return found


@pytest.mark.parametrize("path", ["/double/predict", "/double/double/predict"])
def test_a_prediction_does_not_pass_serve_and_is_counted(path: str):
    replica, fast, _ = setting()
    [(status, headers, body)] = send(fast, raw(path, headers={"x-request-id": "mine"}))
    assert (status, json.loads(body)) == (200, {"rows": [{"x": 4.0}]})
    assert headers["x-request-id"] == "mine"
    assert headers["content-type"] == "application/json"
    assert replica.seen == {"inc": 1, "dec": 1, "requests": 1, "200": 1, "latency": 2}


def test_at_the_root_there_is_no_prefix():
    replica, fast, _ = setting(prefix="/")
    assert send(fast, raw("/predict"))[0][0] == 200
    assert not replica.seen["serve"]


def test_a_query_is_read():
    replica, fast, _ = setting()
    [(status, _, body)] = send(fast, raw("/double/predict?on_error=partial"))
    assert (status, json.loads(body)) == (200, {"rows": [{"x": 4.0}], "errors": []})
    assert not replica.seen["serve"]


def test_a_refused_request_is_counted_as_what_it_is():
    replica, fast, _ = setting()
    assert send(fast, raw(body=b"{"))[0][0] == 400
    assert replica.seen == ONE_REFUSED | {"400": 1}


def test_a_connection_is_kept_and_a_body_may_come_in_pieces():
    replica, fast, _ = setting()
    whole = raw()
    found = send(fast, whole, whole[:30], whole[30:-5], whole[-5:-2], whole[-2:], whole)
    assert [json.loads(body)["rows"] for _, _, body in found] == [[{"x": 4.0}]] * 3
    assert replica.seen["200"] == 3


def test_pipelined_requests_are_answered_in_order():
    replica, fast, _ = setting()
    replica.leads_on = True
    bodies = [b'{"rows":[{"x":%d}]}' % i for i in range(6)]
    found = send(fast, b"".join(raw(body=body) for body in bodies))
    assert [status for status, _, _ in found] == [200] * 6
    assert [json.loads(body)["rows"] for _, _, body in found] == [
        [{"x": 2.0 * i}] for i in range(6)
    ]
    # The first takes the short way; the others wait for it in uvicorn's own queue.
    assert replica.seen["serve"] == 5


@pytest.mark.parametrize(
    ("more", "kept"),
    [({}, True), ({"headers": {"connection": "close"}}, False), ({"version": "1.0"}, False)],
)
def test_the_connection_ends_when_the_client_wants_it(more: dict[str, Any], kept: bool):
    _, fast, _ = setting()
    transport = asyncio.run(talk(fast, raw(**more)))
    [(status, headers, _)] = answers(transport.written)
    assert status == 200
    assert transport.closed is not kept
    assert (headers.get("connection") == "close") is not kept


class Clock:
    """The part of an event loop that a connection's own timer needs, with time by hand."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.timers: list[tuple[float, Callable[[], None]]] = []

    def time(self) -> float:
        return self.now_s

    def call_later(self, delay_s: float, call: Callable[..., None], *args: Any) -> SimpleNamespace:
        timer = (self.now_s + delay_s, functools.partial(call, *args))
        self.timers.append(timer)
        return SimpleNamespace(cancel=lambda: self.timers.remove(timer))

    def advance(self, seconds: float) -> None:
        self.now_s += seconds
        for timer in [timer for timer in self.timers if timer[0] <= self.now_s]:
            self.timers.remove(timer)
            timer[1]()


def test_a_connection_is_closed_when_nothing_came_for_long_after_an_answer():
    """Never before, and never while a request is being sent."""
    _, fast, _ = setting()
    clock = Clock()

    async def answered(protocol: LeanProtocol, piece: bytes) -> None:
        protocol.data_received(piece)
        await asyncio.wait_for(_until(lambda: protocol.cycle.response_complete), 60)

    async def scene() -> None:
        config = uvicorn.Config(fast, lifespan="off", timeout_keep_alive=5)
        config.load()
        protocol = LeanProtocol(config, ServerState(), {}, clock)  # type: ignore[arg-type]
        transport = Transport()
        protocol.connection_made(transport)
        for _ in range(3):
            await answered(protocol, raw())
            clock.advance(4)
        assert not transport.closed, "it is busy every 4 s"
        assert len(clock.timers) == 1, "one timer, however many requests"
        protocol.data_received(raw()[:20])
        clock.advance(100)
        assert not transport.closed, "a request is on its way"
        await answered(protocol, raw()[20:])
        clock.advance(4.9)
        assert not transport.closed
        clock.advance(0.2)
        assert transport.closed
        protocol.connection_lost(None)
        assert clock.timers == []

    asyncio.run(scene())


def test_a_connection_that_is_lost_leaves_no_timer():
    _, fast, _ = setting()
    clock = Clock()

    async def scene() -> None:
        config = uvicorn.Config(fast, lifespan="off")
        config.load()
        protocol = LeanProtocol(config, ServerState(), {}, clock)  # type: ignore[arg-type]
        protocol.connection_made(Transport())
        protocol.data_received(raw())
        await asyncio.wait_for(_until(lambda: protocol.cycle.response_complete), 60)
        assert len(clock.timers) == 1
        protocol.connection_lost(None)
        assert clock.timers == []

    asyncio.run(scene())


@pytest.mark.parametrize(
    "pieces",
    [
        [raw()],
        [raw(), raw()],
        [raw()[:-5]],
        [raw(), raw(path="/double/healthz", method="GET")],
        [raw(path="/double/healthz", method="GET") * 6],
        [raw() * 6],
    ],
    ids=["an answer", "two", "half a body", "the long way", "pipelined", "lean and pipelined"],
)
def test_a_connection_that_is_over_is_freed_without_a_collection(pieces: list[bytes]):
    _, fast, _ = setting()
    seen: list[weakref.ref[LeanProtocol]] = []

    async def scene() -> None:
        config = uvicorn.Config(fast, lifespan="off")
        config.load()
        loop = asyncio.get_running_loop()

        def made() -> LeanProtocol:
            protocol = LeanProtocol(config, ServerState(), {}, loop)
            seen.append(weakref.ref(protocol))
            return protocol

        server = await loop.create_server(made, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        for piece in pieces:
            writer.write(piece)
            if len(piece) == len(raw()):
                await reader.readuntil(b'{"rows":[{"x":4.0}]}')
        await asyncio.sleep(0.05)
        writer.close()
        await asyncio.wait_for(_until(lambda: bool(seen) and seen[0]() is None), 20)
        server.close()

    gc.collect()
    gc.disable()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(scene())
    finally:
        gc.enable()


CHUNKED = {"content-length": None, "transfer-encoding": "chunked"}


@pytest.mark.parametrize(
    ("sent", "later", "more"),
    [
        (raw()[:-5], b"" * 100, {}),
        (raw()[:-15], [b" "] * 12, {}),
        (raw(body=b"4\r\n", headers=CHUNKED), [b"{", b"  "], {"serve": 1}),
    ],
    ids=["nothing comes", "a byte now and then", "chunked"],
)
def test_a_body_that_does_not_come_to_its_end_is_given_up(
    sent: bytes, later: list[bytes], more: dict[str, int]
):
    """Not before its time, and not the connections beside it."""
    replica, fast, ran = setting(body_timeout_s=8)
    replica.leads_on = True
    clock = Clock()

    async def scene() -> None:
        config = uvicorn.Config(fast, lifespan="off")
        config.load()
        state = ServerState()
        loop = asyncio.get_running_loop()
        clock.create_task = loop.create_task  # type: ignore[attr-defined]
        slow, other = (LeanProtocol(config, state, {}, clock) for _ in range(2))  # type: ignore[arg-type]
        ends = (Transport(), Transport())
        for protocol, end in zip((slow, other), ends, strict=True):
            protocol.connection_made(end)
        slow.data_received(sent)
        coming = iter(later)
        for second in range(14):
            clock.advance(1)
            if not ends[0].closed:
                slow.data_received(next(coming, b""))
            if second == 7:
                assert ends[0].written == b""
            if second % 3 == 0:
                other.data_received(raw())
                await asyncio.wait_for(_until(lambda: other.cycle.response_complete), 60)
            await asyncio.sleep(0.001)
        [(status, headers, body)] = answers(ends[0].written)
        assert (status, headers["connection"]) == (408, "close")
        assert json.loads(body)["error"]["code"] == "slow_body"
        assert ends[0].closed
        assert not ends[1].closed
        assert [status for status, _, _ in answers(ends[1].written)] == [200] * 5
        slow.connection_lost(None)
        await asyncio.wait_for(_until(lambda: not state.tasks), 60)
        fast.door._metrics.flush()

    asyncio.run(scene())
    assert ran == [1] * 5
    if more:  # Serve counts what went its way
        assert replica.seen["serve"] == 1
        assert replica.seen["requests"] == 5
    else:
        assert replica.seen["408"] == 1
        assert replica.seen["inc"] == replica.seen["dec"] == 6


def test_a_body_that_is_still_sent_after_the_answer_is_given_up_too():
    _, fast, _ = setting(body_timeout_s=8)
    clock = Clock()

    async def scene() -> None:
        config = uvicorn.Config(fast, lifespan="off")
        config.load()
        clock.create_task = asyncio.get_running_loop().create_task  # type: ignore[attr-defined]
        protocol = LeanProtocol(config, ServerState(), {}, clock)  # type: ignore[arg-type]
        end = Transport()
        protocol.connection_made(end)
        protocol.data_received(raw(path="/double/other")[:-14])
        seconds = 0
        while not end.closed and seconds < 13:
            await asyncio.sleep(0.001)
            protocol.data_received(b" ")
            clock.advance(1)
            seconds += 1
        assert 8 <= seconds < 13
        assert [status for status, _, _ in answers(end.written)] == [299]
        assert end.closed

    asyncio.run(scene())


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110  # what is waited for has no event
        await asyncio.sleep(0.001)


@pytest.mark.parametrize(
    "more",
    [
        {"method": "GET"},
        {"path": "/double/healthz"},
        {"path": "/other/predict"},
        {"headers": {"x-request-timeout-seconds": "3"}},
        {"headers": {"content-length": None, "transfer-encoding": "chunked"},
         "body": b"2\r\n{}\r\n0\r\n\r\n"},
        {"headers": {"upgrade": "h2c", "connection": "x"}},
        {"body": b" " * 1001},
    ],
)  # fmt: skip
def test_everything_else_goes_serves_way(more: dict[str, Any]):
    replica, fast, ran = setting()
    assert send(fast, raw(**more))[0][0] == 299
    assert replica.seen == {"serve": 1}
    assert ran == []


def test_bytes_that_are_no_http_are_refused():
    replica, fast, _ = setting()
    transport = asyncio.run(talk(fast, b"\x16\x03\x01 nonsense\r\n\r\n"))
    assert answers(transport.written)[0][0] == 400
    assert transport.closed
    assert not replica.seen


@pytest.mark.parametrize(
    "setting_of_serve", ["queue", "timeout", "thread", "root path", "other app"]
)
def test_what_serve_must_see_to_itself_is_left_to_it(setting_of_serve: str):
    replica, fast, _ = setting()
    match setting_of_serve:
        case "queue":
            replica.max_queued_requests = 10
        case "root path":
            replica._http_options.root_path = "/behind"
        case "timeout":
            replica._http_options.request_timeout_s = 5.0
        case "thread":
            replica._user_callable_wrapper._run_user_code_in_separate_thread = True
        case "other app":
            replica._user_callable_wrapper._callable._asgi_app = object()
    assert send(fast, raw())[0][0] == 299


def test_rows_of_a_client_that_hung_up_are_not_run():
    replica, fast, ran = setting()
    assert send(fast, raw(), hang_up=True) == []
    assert ran == []
    assert replica.seen == ONE_REFUSED | {"499": 1}


@pytest.mark.parametrize("requests", [1, 3], ids=["one", "with pipelined ones behind it"])
def test_rows_of_a_client_that_hung_up_leave_the_queue_at_once(requests: int):
    """They would hold the places of clients that are still there."""
    replica, fast, ran = setting(wait_ms=60_000)

    async def scene() -> None:
        config = uvicorn.Config(fast, lifespan="off")
        config.load()
        protocol = LeanProtocol(config, ServerState(), {}, asyncio.get_running_loop())
        protocol.connection_made(Transport())
        protocol.data_received(raw() * requests)
        assert replica.batcher.queued_rows == 1
        protocol.connection_lost(None)
        assert replica.batcher.queued_rows == 0
        await asyncio.wait_for(replica.batcher.close(), 20)
        fast.door._metrics.flush()

    asyncio.run(scene())
    assert ran == []
    assert replica.seen == ONE_REFUSED | {"499": 1}


def test_around_a_proxy_it_passes_everything_on():
    passed = []

    async def proxy(scope: Any, receive: Any, send: Any) -> None:
        passed.append(scope["path"])

    send(FastPath(proxy), raw())
    assert passed == ["/double/predict"]


def test_serve_is_given_one_middleware():
    before = dict(HTTP_PROTOCOLS)
    try:
        [middleware] = middlewares()
        assert middleware.cls is FastPath
        assert import_from_string(HTTP_PROTOCOLS["auto"]) is LeanProtocol
    finally:
        HTTP_PROTOCOLS.update(before)


def test_the_replica_of_this_ray_has_every_name_that_is_read():
    """Names that are set in constructors are looked for in the source."""
    import inspect

    from ray.serve._private import replica
    from ray.serve._private.request_ingress_metrics import RequestIngressMetrics

    assert {"max_queued_requests", "_direct_ingress_asgi"} <= set(dir(replica.Replica))
    manager = inspect.getsource(replica.ReplicaMetricsManager)
    for name in vars(Manager(lambda _: None)):
        if name != "_tracker":
            assert name in manager
    for name in ("request_tags", "request_error_tags", "deployment_error_tags"):
        assert callable(getattr(RequestIngressMetrics, name))
