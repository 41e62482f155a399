"""The OpenAI API's short way past Serve's wrapper: what it takes, and what it keeps true."""

import asyncio
from typing import Any

import pytest

pytest.importorskip("ray.serve")
from test_fastpath import Replica, setting

from twinpath.online.fastpath import FastPath
from twinpath.online.protocols.openai import OpenAIDoor


class Engine:
    """Stands for the engine's app: says where it was reached, and waits to be told to end."""

    def __init__(self) -> None:
        self.scopes: list[Any] = []
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await self.go_on.wait()
        await send({"type": "http.response.body", "body": b"engine"})


class Call:
    """One request, and what was answered."""

    def __init__(self, path: str = "/double/v1/completions", method: str = "POST", **headers: str):
        named = [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()]
        self.scope = {
            "type": "http", "method": method, "path": path, "root_path": "", "headers": named,
            "query_string": b"", "client": ("10.0.0.1", 5),
        }  # fmt: skip
        self.messages: list[Any] = []

    async def of(self, fast: FastPath) -> "Call":
        await fast(self.scope, self.receive, self.send)
        return self

    async def receive(self) -> Any:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(self, message: Any) -> None:
        self.messages.append(message)

    @property
    def status(self) -> int:
        return self.messages[0]["status"]

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.messages[0]["headers"])


def engine_setting() -> tuple[Replica, FastPath, Engine]:
    replica, fast, _ = setting()
    graph = replica._user_callable_wrapper._callable._asgi_app
    engine = Engine()
    graph.openai = OpenAIDoor(engine, graph.frontend)
    return replica, fast, engine


async def test_a_request_goes_to_the_engine_and_serve_counts_it():
    replica, fast, engine = engine_setting()
    call = await Call(x_request_id="abc").of(fast)
    assert call.status == 200
    assert call.messages[-1]["body"] == b"engine"
    assert call.headers[b"x-request-id"] == b"abc"
    assert engine.scopes[0]["root_path"] == "/double"
    assert fast.door is not None
    fast.door._metrics.flush()  # type: ignore[union-attr]
    assert replica.seen["serve"] == 0
    assert (replica.seen["inc"], replica.seen["dec"], replica.seen["requests"]) == (1, 1, 1)


async def test_a_stream_is_ongoing_until_its_end():
    replica, fast, engine = engine_setting()
    engine.go_on.clear()
    task = asyncio.ensure_future(Call().of(fast))
    await asyncio.sleep(0)
    assert (replica.seen["inc"], replica.seen["dec"]) == (1, 0)
    engine.go_on.set()
    await task
    assert replica.seen["dec"] == 1


async def test_a_stream_that_is_cancelled_is_not_ongoing_any_more():
    replica, fast, engine = engine_setting()
    engine.go_on.clear()
    task = asyncio.ensure_future(Call().of(fast))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (replica.seen["inc"], replica.seen["dec"]) == (1, 1)


@pytest.mark.parametrize(
    "call",
    [
        Call("/double/v1/sleep"),
        Call("/other/v1/completions"),
        Call("/double/v1/models", method="GET"),
        Call(x_request_timeout_seconds="5"),
    ],
)
async def test_other_requests_go_serves_way(call: Call):
    replica, fast, engine = engine_setting()
    assert (await call.of(fast)).status == 299
    assert replica.seen["serve"] == 1
    assert engine.scopes == []


async def test_what_serve_has_to_see_to_goes_its_way():
    replica, fast, _ = engine_setting()
    replica.max_queued_requests = 5
    assert (await Call().of(fast)).status == 299


async def test_a_graph_without_an_engine_has_no_such_way():
    replica, fast, _ = setting()
    assert (await Call().of(fast)).status == 299
    assert replica.seen["serve"] == 1
