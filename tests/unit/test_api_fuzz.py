"""The described API against generated requests, good and bad: what it answers is documented."""

import tempfile
from pathlib import Path

import httpx
import pytest
import schemathesis
from hypothesis import settings
from pydantic import BaseModel, Field
from schemathesis.checks import CheckFunction
from schemathesis.specs.openapi import checks

from twinpath import Batch, Columns, Graph, Node
from twinpath.graph.stage import Executor
from twinpath.online import protocols
from twinpath.online.app import GraphApp, graph_app
from twinpath.online.batcher import Batcher
from twinpath.online.gateway.args import GatewayArgs
from twinpath.online.gateway.keys import new_key, write_keys
from twinpath.online.gateway.middleware import OPEN_PATHS

pytestmark = pytest.mark.slow


class Number(BaseModel, extra="forbid", strict=True):
    x: float = Field(examples=[2.0])
    label: str = "none"


class Answer(BaseModel):
    y: float
    label: str


class Double(Node):
    inputs, outputs = {"x": "float64"}, {"y": "float64"}

    def predict(self, columns: Columns) -> Columns:
        if (columns["x"] == 1).any():
            raise ValueError("one is refused")
        return {"y": columns["x"] * 2}


def app(max_body_bytes: int = 1 << 20, gateway: GatewayArgs | None = None) -> GraphApp:
    graph = Graph("numbers", input=Number, output=Answer)
    with graph as number:
        graph.output(Double()(number))
    executor = Executor(graph.plan)
    executor.setup()
    batcher = Batcher(executor.run, Batch())
    return graph_app(graph.plan, batcher, max_body_bytes=max_body_bytes, gateway=gateway)


class Guarded:
    """An app with a gateway, and keys that open it, that are for another graph, and whose only
    request of today is made."""

    def __init__(self) -> None:
        folder = Path(tempfile.mkdtemp(prefix="twinpath-fuzz-"))
        self.mine, first = new_key("ann")
        self.others, second = new_key("ben", ("letters",))
        self.spent, third = new_key("cyd", quota="1/day")
        write_keys(folder / "keys", [first, second, third])
        args = {"api_keys": str(folder / "keys"), "max_rows": 2}
        self.app = app(200, GatewayArgs.model_validate(args))
        self.schema = schemathesis.openapi.from_asgi(
            "/openapi.json", self.app, headers=by(self.spent)
        )


def by(key: str) -> dict[str, str]:
    return {"x-api-key": key}


#: Of every answer. That a request fits the schema does not make its tensors fit the model, so a
#: standard protocol's endpoint may refuse it; the typed endpoint's schema says all.
ALWAYS: list[CheckFunction] = [
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
TYPED: list[CheckFunction] = [*ALWAYS, checks.negative_data_rejection]
open_app = app()
api = schemathesis.openapi.from_asgi("/openapi.json", open_app)
guarded = Guarded()
guarded_api = guarded.schema


@api.parametrize()
@settings(max_examples=60, deadline=None)
def test_every_answer_is_as_described(case: schemathesis.Case):
    # One that unloads the model is tried too, and must not end it for all others.
    open_app.frontend.plane.loaded = True
    typed = case.path.endswith("/predict") and (case.query or {}).get("on_error") != "partial"
    case.call_and_validate(checks=TYPED if typed else ALWAYS)


@guarded_api.parametrize()
@settings(max_examples=10, deadline=None)
def test_every_answer_behind_the_gateway_is_as_described(case: schemathesis.Case):
    guarded.app.frontend.plane.loaded = True
    case.headers.clear()  # credentials of its own invention
    case.call_and_validate(checks=ALWAYS, headers=by(guarded.mine))
    if case.path in OPEN_PATHS:
        return
    for headers, status in ((by("tp_x"), 401), (by(guarded.others), 403), (by(guarded.spent), 429)):
        answer = case.call_and_validate(checks=ALWAYS, headers=headers)
        assert answer.status_code == status


def test_every_path_that_is_answered_is_described():
    plane = open_app.frontend.plane
    described = {path.replace("{version}", "1") for path in api.raw_schema["paths"]}
    assert set(open_app.frontend.codecs) <= described
    for route in protocols.routes(plane):
        path = getattr(route, "path", "").replace("{model}", plane.name).replace("{version}", "1")
        assert path in described or path == "/v1/models/{place:path}"


async def test_the_examples_of_the_description_are_answered():
    open_app.frontend.plane.loaded = True
    tried = 0
    transport = httpx.ASGITransport(open_app)
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        for path, operations in api.raw_schema["paths"].items():
            body = operations.get("post", {}).get("requestBody", {}).get("content", {})
            for example in body.get("application/json", {}).get("schema", {}).get("examples", ()):
                answer = await client.post(path.replace("{version}", "1"), json=example)
                assert answer.status_code == 200, (path, answer.text)
                tried += 1
    assert tried == 11  # two paths, the protocol's two, six of TensorFlow Serving, MLflow's
