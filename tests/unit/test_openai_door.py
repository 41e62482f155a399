"""What the platform adds to an engine's OpenAI app: gateway, errors, the cost of a request."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from pydantic import BaseModel

from twinpath import Graph, Node
from twinpath.errors import RetryLaterError
from twinpath.graph.columns import Columns
from twinpath.graph.placement import Batch
from twinpath.graph.stage import Executor
from twinpath.nodes.llm_usage import USAGE
from twinpath.online.app import GraphApp, graph_app
from twinpath.online.batcher import Batcher
from twinpath.online.gateway.args import GatewayArgs, LimitArgs
from twinpath.online.health import end_with
from twinpath.online.protocols.openai import OpenAIDoor, engine_step


class Prompt(BaseModel):
    prompt: str


class Text(BaseModel):
    text: str


class Engine(Node):
    """A node that could answer the OpenAI API."""

    inputs = {"prompt": "str"}
    outputs = {"text": "str"}

    async def openai_app(self) -> Any:
        return answers

    def predict(self, columns: Columns) -> Columns:
        return {"text": columns["prompt"]}


class After(Node):
    inputs = {"text": "str"}
    outputs = {"text": "str"}

    def predict(self, columns: Columns) -> Columns:
        return {"text": columns["text"]}


async def answers(scope: Any, receive: Any, send: Any) -> None:
    """Stands for the engine's app: it costs ten tokens, and does what the body says."""
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    wish = json.loads(body or b"{}").get("wish")
    usage = USAGE.get()
    assert usage is not None
    usage.completion_tokens += 10
    media = b"text/event-stream" if wish else b"application/json"
    if wish == "raise":
        raise ValueError("secret")
    headers = [(b"content-type", media)]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    if wish:
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        if wish == "raise late":
            raise ValueError("secret")
        await asyncio.sleep(60)
    await send({"type": "http.response.body", "body": json.dumps({"path": scope["path"]}).encode()})


def plan_of(*nodes: Node) -> Any:
    graph = Graph("chat", input=Prompt, output=Text)
    with graph as handle:
        for node in nodes:
            handle = node(handle)
        graph.output(handle)
    return graph.plan


async def app_of(gateway: GatewayArgs | None = None, health: Any = lambda: None) -> GraphApp:
    plan = plan_of(Engine())
    executor = Executor(plan)
    executor.setup()
    app = graph_app(plan, Batcher(executor.run, Batch()), max_body_bytes=1000, gateway=gateway)
    step = engine_step(plan)
    assert step is not None
    app.openai = OpenAIDoor(await executor.nodes[step.name].openai_app(), app.frontend, health)
    return app


def client(app: Any, **more: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, **more), base_url="http://chat")


def test_only_a_graph_that_is_an_engine_answers_the_openai_api():
    assert engine_step(plan_of(Engine())) is not None
    assert engine_step(plan_of(Engine(), After())) is None


async def test_a_model_that_is_unloaded_is_so_for_the_engines_endpoints_too():
    app = await app_of()
    async with client(app) as http:
        app.frontend.plane.loaded = False
        refused = await http.post("/v1/chat/completions", json={})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        assert "is unloaded: load it first" in refused.json()["error"]["message"]
        app.frontend.plane.loaded = True
        assert (await http.post("/v1/chat/completions", json={})).status_code == 200


async def test_paths_of_the_api_are_the_engines_and_others_stay_the_graphs():
    async with client(await app_of()) as http:
        for path in ("/v1/chat/completions", "/score", "/v1/responses/abc/cancel"):
            answer = await http.post(path, json={})
            assert answer.json() == {"path": path}
            assert answer.headers["x-request-id"]
        assert (await http.get("/v1/models")).json() == {"path": "/v1/models"}
        own = await http.post("/chat/predict", json={"rows": [{"prompt": "a"}]})
        assert own.json() == {"rows": [{"text": "a"}]}
        for path in ("/sleep", "/metrics", "/v1/load_lora_adapter", "/collective_rpc"):
            assert (await http.post(path, json={})).status_code in (404, 405)


async def test_tokens_are_charged_when_they_are_known_and_refused_afterwards():
    gateway = GatewayArgs(limits=LimitArgs(tokens="15/day"))
    async with client(await app_of(gateway)) as http:
        answers = [await http.post("/v1/completions", json={}) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    error = answers[2].json()["error"]
    assert error["code"] == "rate_limited"
    assert "15/day tokens is used up" in error["message"]
    assert int(answers[2].headers["retry-after"]) > 1


async def test_a_body_over_the_limit_is_refused_whether_or_not_it_says_its_length():
    async def pieces() -> Any:
        for _ in range(20):
            yield b" " * 100

    async with client(await app_of()) as http:
        declared = await http.post("/v1/completions", content=b" " * 2000)
        chunked = await http.post("/v1/completions", content=pieces())
    for answer in (declared, chunked):
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "body_too_large"


async def test_a_deadline_ends_a_stream_with_an_event():
    async with client(await app_of(GatewayArgs())) as http:
        headers = {"X-Request-Timeout-Ms": "50"}
        answer = await http.post("/v1/completions", json={"wish": "wait"}, headers=headers)
    events = answer.text.split("\n\n")
    assert events[0] == "data: 1"
    assert json.loads(events[1].removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
    assert events[2] == "data: [DONE]"


async def test_an_unexpected_error_tells_nothing_and_ends_what_had_begun():
    async with client(await app_of()) as http:
        before = await http.post("/v1/completions", json={"wish": "raise"})
        amid = await http.post("/v1/completions", json={"wish": "raise late"})
    assert before.status_code == 500
    assert before.json()["error"]["type"] == "server_error"
    assert amid.text.endswith("data: [DONE]\n\n")
    assert "secret" not in before.text + amid.text


async def test_a_dead_engine_is_tried_again_elsewhere():
    def dead() -> None:
        raise RetryLaterError("it has ended")

    async with client(await app_of(health=dead)) as http:
        answer = await http.post("/v1/completions", json={})
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"


async def test_a_replica_ends_once_its_engine_has(monkeypatch: pytest.MonkeyPatch):
    looks = iter([None, None, RetryLaterError("it has ended")])
    ended: list[int] = []

    def check() -> None:
        problem = next(looks)
        if problem is not None:
            raise problem

    monkeypatch.setattr("twinpath.online.health.LOOK_S", 0.0)
    monkeypatch.setattr("twinpath.online.health.LAST_WORDS_S", 0.0)
    await end_with(check, ended.append)
    assert ended == [1]
