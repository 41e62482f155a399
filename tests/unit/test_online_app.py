"""The REST endpoint: each answer and each refusal, without Ray."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import jsonschema
import numpy as np
import pytest
from pydantic import BaseModel, Field

from twinpath import Graph, Node
from twinpath.errors import OverloadedError
from twinpath.graph.columns import ROW_ERROR, Columns, Outcome, RowError, row_count
from twinpath.graph.context import remark
from twinpath.graph.placement import Batch
from twinpath.graph.stage import Executor
from twinpath.online.app import GraphApp, graph_app
from twinpath.online.batcher import Batcher
from twinpath.online.dataplane import Ask
from twinpath.online.exchange import Request

LIMIT = 2000


class Number(BaseModel, extra="forbid"):
    x: float = Field(examples=[2.0])
    label: str = "none"


class Answer(BaseModel):
    y: float
    label: str


class Double(Node):
    inputs = {"x": "float64"}
    outputs = {"y": "float64"}

    def predict(self, columns: Columns) -> Columns:
        if (columns["x"] == 13).any():
            raise ValueError("thirteen")
        return {"y": columns["x"] * 2}


class TooFew(Double):
    def predict(self, columns: Columns) -> Columns:
        return {"y": columns["x"][:-1]}


def app_of(node: Node, **limits: int) -> GraphApp:
    graph = Graph("numbers", input=Number, output=Answer)
    with graph as number:
        graph.output(node(number, name="double"))
    executor = Executor(graph.plan)
    executor.setup()
    batcher = Batcher(executor.run, Batch(), **limits)
    return graph_app(graph.plan, batcher, max_body_bytes=LIMIT, close=batcher.close)


@asynccontextmanager
async def client_of(app: Any, root_path: str = "") -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=app, root_path=root_path)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(app_of(Double())) as client:
        yield client


def error_of(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    error: dict[str, Any] = answer.json()["error"]
    assert error["code"] == code
    assert error["message"]
    return error


@pytest.mark.parametrize("path", ["/predict", "/numbers/predict"])
async def test_rows_in_rows_out(client: httpx.AsyncClient, path: str):
    answer = await client.post(path, json={"rows": [{"x": 1}, {"x": 2.5, "label": "é"}]})
    assert answer.status_code == 200
    assert answer.json() == {"rows": [{"y": 2.0, "label": "none"}, {"y": 5.0, "label": "é"}]}


class Degraded(Double):
    def predict(self, columns: Columns) -> Columns:
        if (columns["x"] < 0).any():
            remark("features", "degraded")
        return {"y": columns["x"]}


async def test_what_a_node_says_of_an_answer_is_a_header_of_it():
    async with client_of(app_of(Degraded())) as client:
        marked = await client.post("/predict", json={"rows": [{"x": -1}]})
        plain = await client.post("/predict", json={"rows": [{"x": 1}]})
    assert (marked.status_code, marked.headers["x-features"]) == (200, "degraded")
    assert "x-features" not in plain.headers


class Busy(Double):
    def predict(self, columns: Columns) -> Columns:
        busy = RowError("retry_later", "its replica ended")
        errors = np.array([busy if x < 0 else None for x in columns["x"]], dtype=object)
        return {"y": columns["x"], ROW_ERROR: errors}


async def test_rows_that_failed_for_now_are_to_be_sent_again():
    async with client_of(app_of(Busy())) as client:
        rows = {"rows": [{"x": 1}, {"x": -1}]}
        whole = await client.post("/predict", json=rows)
        partial = await client.post("/predict?on_error=partial", json=rows)
        triton = await client.post(
            "/v2/models/numbers/infer",
            json={"inputs": [{"name": "x", "datatype": "FP64", "shape": [1, 1], "data": [-1]}]},
        )
    assert (whole.status_code, whole.headers["retry-after"]) == (503, "1")
    assert whole.json()["error"]["code"] == "retry_later"
    assert partial.json()["rows"] == [{"y": 1.0, "label": "none"}, None]
    assert (triton.status_code, triton.headers["retry-after"]) == (503, "1")


@pytest.mark.parametrize("path", ["/predict", "/numbers/predict", "/readyz", "/docs"])
async def test_every_path_works_below_a_route_prefix(path: str):
    async with client_of(app_of(Double()), root_path="/deep/down") as client:
        answer = await client.request(
            "POST" if "predict" in path else "GET",
            "/deep/down" + path,
            json={"rows": [{"x": 1}]},
        )
    assert answer.status_code == 200, answer.text


async def test_the_body_is_json_without_saying_so(client: httpx.AsyncClient):
    answer = await client.post("/predict", content=b'{"rows": [{"x": 1}]}')
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "code", "says"),
    [
        (b"", 400, "empty_body", "empty"),
        (b"  \n", 400, "empty_body", "empty"),
        (b'{"rows": []}', 400, "empty_body", "at least one row"),
        (b'{"rows": [', 400, "malformed_body", "not JSON"),
        (b"\xff\xfe", 400, "malformed_body", "not JSON"),
        (b"[1, 2]", 400, "malformed_body", "rows"),
        (b'{"row": [{"x": 1}]}', 400, "malformed_body", "rows"),
        (b'{"rows": [{"x": NaN}]}', 400, "malformed_body", "NaN"),
        (b'{"rows": [{"x": 1}], "extra": 1}', 400, "malformed_body", "extra"),
        (b'{"rows": [{"x": "one"}]}', 422, "invalid_input", "one"),
        (b'{"rows": [{"x": null}]}', 422, "invalid_input", "x"),
        (b'{"rows": [7]}', 422, "invalid_input", ""),
        (b'{"rows": [{}]}', 422, "invalid_input", "x"),
        (b'{"rows": [{"x": 1, "lable": "a"}]}', 422, "invalid_input", "Did you mean 'label'?"),
        (b"[" * 100_000, 413, "body_too_large", str(LIMIT)),
        (b"[" * 1900, 400, "malformed_body", "not JSON"),
    ],
)
async def test_bad_bodies_are_refused_with_what_was_expected(
    client: httpx.AsyncClient, body: bytes, status: int, code: str, says: str
):
    error = error_of(await client.post("/predict", content=body), status, code)
    assert says in error["message"] + json.dumps(error.get("rows", ""))


async def test_a_body_that_is_not_json_by_its_own_word_is_refused(client: httpx.AsyncClient):
    answer = await client.post("/predict", content=b"x=1", headers={"content-type": "text/csv"})
    error = error_of(answer, 415, "unsupported_media_type")
    assert "text/csv" in error["message"]
    assert "application/json" in error["message"]


async def test_a_body_over_the_limit_is_not_read_to_its_end():
    read = 0

    async def endless() -> dict[str, Any]:
        nonlocal read
        read += 500
        return {"type": "http.request", "body": b" " * 500, "more_body": True}

    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": "/predict", "headers": [], "query_string": b"",
    }  # fmt: skip
    await app_of(Double())(scope, endless, send)  # type: ignore[arg-type]
    assert sent[0]["status"] == 413
    assert read <= LIMIT + 500


async def test_a_failing_row_fails_its_request_and_is_named(client: httpx.AsyncClient):
    answer = await client.post("/predict", json={"rows": [{"x": 1}, {"x": 13}]})
    error = error_of(answer, 422, "row_failed")
    assert error["rows"] == [
        {
            "row": 1,
            "code": "row_failed",
            "message": "node 'double': ValueError: thirteen",
            "node": "double",
            "field": None,
        }
    ]


async def test_partial_answers_give_null_for_rows_that_failed(client: httpx.AsyncClient):
    rows = [{"x": "no"}, {"x": 1}, {"x": 13}, {"x": 2}]
    answer = await client.post("/predict?on_error=partial", json={"rows": rows})
    assert answer.status_code == 200
    document = answer.json()
    assert [row and row["y"] for row in document["rows"]] == [None, 2.0, None, 4.0]
    failed = [(error["row"], error["code"]) for error in document["errors"]]
    assert failed == [(0, "invalid_input"), (2, "row_failed")]
    assert document["errors"][0]["field"] == "x"


async def test_partial_answers_when_every_row_is_refused(client: httpx.AsyncClient):
    answer = await client.post("/predict?on_error=partial", json={"rows": [{"x": "no"}]})
    assert answer.status_code == 200
    assert answer.json()["rows"] == [None]


async def test_an_unknown_wish_for_errors_is_refused(client: httpx.AsyncClient):
    answer = await client.post("/predict?on_error=ignore", json={"rows": [{"x": 1}]})
    assert "'partial'" in error_of(answer, 400, "malformed_body")["message"]


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"])
async def test_another_method_is_refused_with_the_right_one(client: httpx.AsyncClient, method: str):
    answer = await client.request(method, "/numbers/predict")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"
    if method != "HEAD":
        assert "POST" in error_of(answer, 405, "method_not_allowed")["message"]


async def test_posting_to_a_page_is_refused_as_json(client: httpx.AsyncClient):
    answer = await client.post("/healthz")
    error_of(answer, 405, "method_not_allowed")
    assert "GET" in answer.headers["allow"]


@pytest.mark.parametrize("path", ["/predictt", "/numbers", "/docs/none.js"])
async def test_an_unknown_path_says_which_there_are(client: httpx.AsyncClient, path: str):
    error = error_of(await client.get(path), 404, "not_found")
    for known in ("POST /numbers/predict", "/docs", "/openapi.json", "/healthz", "/readyz"):
        assert known in error["message"]


async def test_an_overload_says_when_to_come_back():
    async def refuse(columns: Columns) -> Outcome:
        raise OverloadedError("full", retry_after_s=2.4)

    app = app_of(Double())
    app._plane._batcher._run = refuse
    async with client_of(app) as client:
        answer = await client.post("/predict", json={"rows": [{"x": 1}]})
    error_of(answer, 503, "overloaded")
    assert answer.headers["retry-after"] == "3", "rounded up: no client comes back too early"


async def test_a_node_that_breaks_its_contract_is_a_500_that_names_it():
    async with client_of(app_of(TooFew())) as client:
        answer = await client.post("/predict", json={"rows": [{"x": 1}, {"x": 2}]})
    assert "'double'" in error_of(answer, 500, "node_contract")["message"]


async def test_a_bug_is_a_500_without_its_inside(caplog: pytest.LogCaptureFixture):
    async def run(columns: Columns) -> Outcome:
        raise ZeroDivisionError("secret detail")

    app = app_of(Double())
    app._plane._batcher._run = run
    async with client_of(app) as client:
        answer = await client.post(
            "/predict", json={"rows": [{"x": 1}]}, headers={"x-request-id": "abc"}
        )
    error_of(answer, 500, "internal")
    assert "secret" not in answer.text
    assert "secret detail" in caplog.text, "the log has it"
    assert "abc" in caplog.text, "with the request's id"


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/predict"), ("GET", "/none"), ("GET", "/predict"),
                         ("GET", "/readyz")],
)  # fmt: skip
async def test_the_request_id_comes_back_on_every_answer(
    client: httpx.AsyncClient, method: str, path: str
):
    answer = await client.request(method, path, headers={"X-Request-Id": "abc-1"})
    assert answer.headers["x-request-id"] == "abc-1"
    answer = await client.request(method, path)
    assert len(answer.headers["x-request-id"]) >= 16, "one is made when none was given"


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/docs", "/openapi.json"])
async def test_the_pages_are_there(client: httpx.AsyncClient, path: str):
    assert (await client.get(path)).status_code == 200


async def test_the_api_page_needs_nothing_from_the_internet(client: httpx.AsyncClient):
    page = (await client.get("/docs")).text
    assert "http://" not in page
    assert "https://" not in page
    for asset in ("docs/swagger-ui.css", "docs/swagger-ui-bundle.js"):
        assert asset in page
        assert (await client.get("/" + asset)).status_code == 200


async def test_the_description_is_valid_and_describes_what_is_answered(client: httpx.AsyncClient):
    document = (await client.get("/openapi.json")).json()
    assert document["openapi"].startswith("3.1")
    predict = document["paths"]["/numbers/predict"]["post"]
    assert {"200", "400", "413", "415", "422", "500", "503", "504"} <= set(predict["responses"])
    body = predict["requestBody"]["content"]["application/json"]["schema"]
    components = {"components": document["components"]}
    [example] = body["examples"]
    jsonschema.validate(example, body | components)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"rows": [{"x": "one"}]}, body | components)
    for status, given in {"200": example, "422": {"rows": [{"x": 13}]}}.items():
        answer = await client.post("/predict", json=given)
        assert str(answer.status_code) == status
        schema = predict["responses"][status]["content"]["application/json"]["schema"]
        jsonschema.validate(answer.json(), schema | components)


async def test_clients_that_come_together_share_a_batch():
    sizes: list[int] = []

    async def run(columns: Columns) -> Outcome:
        sizes.append(row_count(columns))
        await asyncio.sleep(0.01)
        return Outcome.success({"y": columns["x"] * 2, "label": columns["label"]}, sizes[-1])

    app = app_of(Double())
    app._plane._batcher._run = run
    async with client_of(app) as client:
        answers = await asyncio.gather(
            *(client.post("/predict", json={"rows": [{"x": i}]}) for i in range(20))
        )
    assert [answer.json()["rows"][0]["y"] for answer in answers] == [2.0 * i for i in range(20)]
    assert len(sizes) < 20


class Slowly:
    """A gate that has to wait, as for a count in Redis."""

    def __init__(self) -> None:
        self.opened = asyncio.Event()
        self.ended: list[str] = []

    def admit(self, ask: Ask) -> Any:
        return self.opened.wait()

    def admit_rows(self, ask: Ask) -> None: ...

    def headers(self, ask: Ask) -> Any:
        return []

    def done(self, ask: Ask, status: int, code: str) -> None:
        self.ended.append(code)


@pytest.mark.parametrize(("hangs_up", "ran"), [(True, 0), (False, 1)])
async def test_rows_of_a_client_that_hung_up_at_the_gate_are_not_run(hangs_up: bool, ran: int):
    app = app_of(Double())
    frontend = app.frontend
    gate = frontend.gate = Slowly()
    headers = {b"content-type": b"application/json"}
    path = "/predict"
    codec = frontend.codec(path)
    ask = frontend.ask(path, headers, 0, "")
    answers: list[Any] = []
    request = Request(path, b"", headers, b'{"rows": [{"x": 1}]}')
    exchange = frontend.begin(codec, request, ask, answers.append)
    await asyncio.sleep(0)
    if hangs_up:
        exchange.give_up()
    gate.opened.set()
    while not answers:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.05)
    assert frontend.plane.statistics.as_dict("numbers", "1")["execution_count"] == ran
    assert len(answers) == len(gate.ended) == 1


async def test_shutting_down_waits_for_what_was_accepted():
    app = app_of(Double())
    gate = asyncio.Event()

    async def run(columns: Columns) -> Outcome:
        await gate.wait()
        return Outcome.success({"y": columns["x"], "label": columns["label"]}, 1)

    app._plane._batcher._run = run
    async with client_of(app) as client:
        asked = asyncio.create_task(client.post("/predict", json={"rows": [{"x": 1}]}))
        while not app._plane._batcher.running_rows:  # noqa: ASYNC110
            await asyncio.sleep(0)
        messages = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])
        sent: list[str] = []

        async def receive() -> Any:
            return next(messages)

        async def send(message: Any) -> None:
            sent.append(message["type"])

        ending = asyncio.create_task(app({"type": "lifespan"}, receive, send))
        await asyncio.sleep(0.02)
        assert not ending.done()
        gate.set()
        await ending
        assert (await asked).status_code == 200
        assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
