"""MLflow's scoring protocol in front of a graph, and beside MLflow's own server."""

import base64
import datetime as dt
import importlib.metadata
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from twinpath import Graph, Node
from twinpath.errors import OverloadedError, TwinpathError
from twinpath.graph.columns import Columns
from twinpath.graph.local import LocalRunner
from twinpath.graph.placement import Batch
from twinpath.graph.stage import Executor
from twinpath.graph.tensors import Tensor
from twinpath.online.app import GraphApp
from twinpath.online.batcher import Batcher
from twinpath.online.dataplane import DataPlane
from twinpath.online.exchange import Answer, Request
from twinpath.online.frontend import Frontend
from twinpath.online.protocols import mlflow_scoring


class Flight(BaseModel):
    distance: float = Field(ge=0)
    carrier: str = "none"
    at: dt.datetime | None = None


class Delay(BaseModel):
    p: float
    label: str


class Pair(BaseModel):
    a: float
    b: float


class Vector(BaseModel):
    x: Annotated[NDArray[Any], Tensor("float32[2]")]


class Blob(BaseModel):
    blob: bytes


class Total(BaseModel):
    total: float


class Guess(Node):
    inputs = {"distance": "float64", "carrier": "str"}
    outputs = {"p": "float64", "label": "str"}

    def predict(self, columns: Columns) -> Columns:
        if (columns["distance"] == 13).any():
            raise ValueError("thirteen")
        return {"p": columns["distance"] / 100, "label": columns["carrier"]}


class AddPair(Node):
    inputs = {"a": "float64", "b": "float64"}
    outputs = {"total": "float64"}

    def predict(self, columns: Columns) -> Columns:
        return {"total": columns["a"] + columns["b"]}


class AddVector(Node):
    inputs = {"x": "float32[2]"}
    outputs = {"total": "float64"}

    def predict(self, columns: Columns) -> Columns:
        return {"total": columns["x"].sum(axis=1).astype(np.float64)}


class Echo(Node):
    inputs = {"blob": "any"}
    outputs = {"blob": "any"}

    def predict(self, columns: Columns) -> Columns:
        return {"blob": columns["blob"]}


def graph_of(given: Any, answer: Any, node: Node) -> Graph:
    graph = Graph("model", input=given, output=answer)
    with graph as row:
        graph.output(node(row))
    return graph


FLIGHTS = graph_of(Flight, Delay, Guess())
PAIRS = graph_of(Pair, Total, AddPair())
VECTORS = graph_of(Vector, Total, AddVector())
BLOBS = graph_of(Blob, Blob, Echo())


def plane_of(graph: Graph) -> DataPlane:
    executor = Executor(graph.plan)
    executor.setup()
    return DataPlane(graph.plan, Batcher(executor.run, Batch()))


def client_of(plane: DataPlane) -> httpx.AsyncClient:
    frontend = Frontend(plane, mlflow_scoring.inference(plane), max_body_bytes=100_000)
    transport = httpx.ASGITransport(app=GraphApp(frontend, mlflow_scoring.routes(plane)))
    return httpx.AsyncClient(transport=transport, base_url="http://test")


async def predictions(client: httpx.AsyncClient, document: Any) -> Any:
    answer = await client.post("/invocations", json=document)
    assert answer.status_code == 200, answer.text
    assert list(answer.json()) == ["predictions"]
    return answer.json()["predictions"]


@pytest.fixture
async def flights() -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(plane_of(FLIGHTS)) as client:
        yield client


FRAME = {"columns": ["distance", "carrier"], "data": [[10, "UA"], [20.5, "é"]]}
RECORDS = [{"distance": 10, "carrier": "UA"}, {"distance": 20.5, "carrier": "é"}]
ANSWERS = [{"p": 0.1, "label": "UA"}, {"p": 0.205, "label": "é"}]


@pytest.mark.parametrize(
    "document",
    [
        {"dataframe_split": FRAME},
        {"dataframe_split": FRAME | {"index": [0, 1]}},
        {"dataframe_split": {"data": [[10, "UA", None], [20.5, "é", "2013-01-01T00:00:00"]]}},
        {"dataframe_split": {"columns": [0, 1, 2], "data": [[10, "UA", None], [20.5, "é", None]]}},
        {"dataframe_records": RECORDS},
        {"dataframe_records": RECORDS, "params": {}},
        {"dataframe_records": RECORDS, "params": None},
        {"instances": RECORDS},
        {"inputs": RECORDS},
        {"inputs": {"distance": [10, 20.5], "carrier": ["UA", "é"]}},
    ],
)
async def test_every_json_form_is_read(flights: httpx.AsyncClient, document: Any):
    assert await predictions(flights, document) == ANSWERS


@pytest.mark.parametrize("form", ["instances", "inputs"])
async def test_values_without_names_are_for_the_only_input(flights, form: str):
    async with client_of(plane_of(VECTORS)) as client:
        assert await predictions(client, {form: [[1, 2], [3, 4.5]]}) == [3.0, 7.5]
    async with client_of(plane_of(PAIRS)) as client:
        assert await predictions(client, {form: [[1, 2], [3, 4.5]]}) == [3.0, 7.5]
    assert await predictions(flights, {form: [10]}) == [{"p": 0.1, "label": "none"}]
    assert await predictions(flights, {"inputs": {"distance": 10}}) == [{"p": 0.1, "label": "none"}]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("distance,carrier\n10,UA\n20.5,é\n", ANSWERS),
        ('\ufeffcarrier,at,distance\r\nUA,,1e1\r\n"é",2013-01-01 05:00:00,20.5\r\n', ANSWERS),
        (",distance,carrier\n0,10,UA\n1,20.5,é\n\n", ANSWERS),
        ("distance,carrier\n10,\n", [{"p": 0.1, "label": "none"}]),
    ],
)
@pytest.mark.parametrize("media", ["text/csv", "text/csv; charset=utf-8", "Text/CSV;charset=UTF-8"])
async def test_csv_is_read_by_the_types_of_the_fields(flights, text: str, wanted: Any, media: str):
    headers = {"content-type": media}
    answer = await flights.post("/invocations", content=text.encode(), headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.json() == {"predictions": wanted}


async def test_a_frame_as_pandas_writes_it_is_read(flights: httpx.AsyncClient):
    frame = pd.DataFrame({"distance": [10, 20.5], "carrier": ["UA", "é"], "at": [pd.NaT, pd.NaT]})
    split = json.loads(frame.to_json(orient="split"))
    assert await predictions(flights, {"dataframe_split": split}) == ANSWERS
    headers = {"content-type": "text/csv"}
    answer = await flights.post("/invocations", content=frame.to_csv().encode(), headers=headers)
    assert answer.json() == {"predictions": ANSWERS}


async def test_bytes_are_base64_text_both_ways():
    text = base64.b64encode(b"\xff\x00").decode()
    async with client_of(plane_of(BLOBS)) as client:
        for document in (
            {"dataframe_records": [{"blob": text}]},
            {"inputs": {"blob": [text]}},
            {"dataframe_split": {"columns": ["blob"], "data": [[text]]}},
        ):
            assert await predictions(client, document) == [text]
        refused = await client.post("/invocations", json={"inputs": {"blob": ["?"]}})
        assert (refused.status_code, "base64" in refused.json()["message"]) == (400, True)


async def test_health_and_version(flights: httpx.AsyncClient):
    for path in ("/ping", "/health"):
        answer = await flights.get(path)
        assert (answer.status_code, answer.text) == (200, "\n")
        assert answer.headers["content-type"] == "application/json"
    answer = await flights.get("/version")
    assert (answer.status_code, answer.text) == (200, importlib.metadata.version("mlflow"))
    assert (await flights.get("/invocations")).status_code == 405


async def test_a_model_out_of_service_does_not_answer_pings():
    plane = plane_of(FLIGHTS)
    plane.loaded = False
    async with client_of(plane) as client:
        assert (await client.get("/ping")).status_code == 404


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "empty"),
        (b"{", "not JSON"),
        (b"[1]", "exactly one of dataframe_split"),
        (b"{}", "none of them"),
        (b'{"instances": [], "inputs": []}', "'instances', 'inputs'"),
        (b'{"instnaces": []}', "Did you mean 'instances'?"),
        (b'{"instances": [{"distance": 1}], "params": {"t": 1}}', "takes none"),
        (b'{"instances": 1}', "expected a list of rows, got 1"),
        (b'{"instances": {"distance": [1]}}', "expected a list of rows"),
        (b'{"inputs": 1}', "columns by name, or a list"),
        (b'{"inputs": {}}', "no rows"),
        (b'{"inputs": [1, {}]}', "row 0"),
        (b'{"dataframe_records": {}}', "expected a list of rows"),
        (b'{"dataframe_records": []}', "empty list"),
        (b'{"dataframe_records": [{"distance": NaN}]}', "NaN is not JSON"),
        (b'{"dataframe_records": [{"distance": -1}]}', "distance"),
        (b'{"dataframe_records": [{"distance": 13}]}', "thirteen"),
        (b'{"dataframe_records": [{"distance": 1, "carier": "a"}]}', "Did you mean 'carrier'?"),
        (b'{"dataframe_split": [1]}', "expected {\"columns\""),
        (b'{"dataframe_split": {"data": [], "rows": 1}}', "unknown key 'rows'"),
        (b'{"dataframe_split": {"columns": "distance", "data": []}}', "list of names"),
        (b'{"dataframe_split": {"columns": ["a", "a"], "data": []}}', "'a' is given twice"),
        (b'{"dataframe_split": {"columns": ["distance"], "data": 1}}', "expected a list of rows"),
        (b'{"dataframe_split": {"columns": ["distance"], "data": []}}', "no rows"),
        (b'{"dataframe_split": {"columns": ["distance"], "data": [[1], [1, 2]]}}', "row 1"),
        (b'{"dataframe_split": {"columns": ["carrier"], "data": [["a"]]}}', "'distance' is"),
    ],
)  # fmt: skip
async def test_bad_json_names_what_was_expected(flights, body: bytes, says: str):
    answer = await flights.post("/invocations", content=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error_code"] == "BAD_REQUEST"
    assert says in answer.json()["message"]


async def test_values_without_names_are_refused_where_the_input_is_open():
    async with client_of(plane_of(PAIRS)) as client:
        for values, says in [([1, 2], "inputs 'a', 'b'"), ([[1, 2], [1]], r"row 1: expected a")]:
            answer = await client.post("/invocations", json={"inputs": values})
            assert says in answer.json()["message"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "line of column names"),
        (b"distance\n", "line of column names"),
        (b"\xff\n1", "CSV in UTF-8"),
        (b"distance\n1,2\n", "row 0: expected 1 values, got 2"),
        (b"distance,distance\n1,2\n", "given twice"),
        (b"distance\n1\nmany\n", "row 1: distance"),
        (b"distance,carrier\n,UA\n", "distance"),
        (b"distance,carier\n1,\n", "Did you mean 'carrier'?"),
    ],
)
async def test_bad_csv_names_what_was_expected(flights, text: bytes, says: str):
    headers = {"content-type": "text/csv"}
    answer = await flights.post("/invocations", content=text, headers=headers)
    assert answer.status_code == 400, answer.text
    assert says in answer.json()["message"]


@pytest.mark.parametrize(
    ("media", "says"),
    [
        ("text/plain", "application/json and text/csv. Got 'text/plain'"),
        ("application/json; charset=latin-1", "only supports UTF-8"),
        ("text/csv; header=present", "Unrecognized content type parameters: header"),
    ],
)
async def test_other_media_are_refused_in_plain_text(flights, media: str, says: str):
    answer = await flights.post("/invocations", content=b"1", headers={"content-type": media})
    assert answer.status_code == 415
    assert answer.headers["content-type"].startswith("text/plain")
    assert says in answer.text


def test_errors_have_the_names_that_mlflow_gives_their_statuses():
    codec = mlflow_scoring.ScoringCodec(plane_of(FLIGHTS))
    answer = codec.refuse(OverloadedError("full"))
    assert (answer.status, json.loads(answer.body)) == (
        503,
        {"error_code": "TEMPORARILY_UNAVAILABLE", "message": "full"},
    )
    exceptions = pytest.importorskip("mlflow.exceptions")
    for status, code in mlflow_scoring._CODES.items():
        assert exceptions.ERROR_CODE_TO_HTTP_STATUS[code] == status


async def test_mlflows_own_server_answers_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")  # it sets it and leaves it
    pytest.importorskip("fastapi")
    mlflow = pytest.importorskip("mlflow")
    scoring_server = pytest.importorskip("mlflow.pyfunc.scoring_server")
    frame = pd.DataFrame({"a": [1.0, 3.0], "b": [2.0, 4.5]})

    class Sum(mlflow.pyfunc.PythonModel):  # type: ignore[misc, name-defined]
        def predict(self, context, model_input, params=None):
            return (model_input["a"] + model_input["b"]).to_numpy()

    signature = mlflow.models.infer_signature(frame, np.zeros(2))
    path = str(tmp_path / "model")
    mlflow.pyfunc.save_model(path, python_model=Sum(), signature=signature, pip_requirements=[])
    theirs = httpx.AsyncClient(
        transport=httpx.ASGITransport(app=scoring_server.init(mlflow.pyfunc.load_model(path))),
        base_url="http://test",
    )
    columns, rows = frame.to_dict("list"), frame.to_dict("records")
    split = {"columns": ["a", "b"], "data": frame.to_numpy().tolist()}
    good: list[tuple[bytes, str]] = [
        (json.dumps(document).encode(), "application/json")
        for document in (
            {"dataframe_split": split},
            {"dataframe_records": rows},
            {"instances": rows},
            {"inputs": columns},
            {"inputs": rows},
        )
    ]
    good.append((frame.to_csv(index=False).encode(), "text/csv"))
    bad = [
        (b"{", "application/json"),
        (b"[]", "application/json"),
        (b'{"instances": [], "inputs": []}', "application/json"),
        (b'{"dataframe_records": 7}', "application/json"),
        (b'{"dataframe_split": {"columns": ["a"], "data": [[1]]}}', "application/json"),
        (b'{"dataframe_records": [{"a": "x", "b": 1}]}', "application/json"),
        (b"{}", "text/plain"),
        (b"{}", "application/json; charset=latin-1"),
    ]
    async with theirs, client_of(plane_of(PAIRS)) as ours:
        for body, media in good:
            answers = [
                await c.post("/invocations", content=body, headers={"content-type": media})
                for c in (theirs, ours)
            ]
            assert [a.status_code for a in answers] == [200, 200], answers[0].text
            assert answers[0].json() == answers[1].json() == {"predictions": [3.0, 7.5]}
        for body, media in bad:
            their, our = [
                await c.post("/invocations", content=body, headers={"content-type": media})
                for c in (theirs, ours)
            ]
            assert their.status_code == our.status_code, (body, their.text, our.text)
            kinds = [a.headers["content-type"].split(";")[0] for a in (their, our)]
            assert kinds[0] == kinds[1]
            if kinds[0] == "application/json":
                assert their.json().keys() >= our.json().keys() == {"error_code", "message"}
        for path in ("/ping", "/health", "/version"):
            their, our = [await c.get(path) for c in (theirs, ours)]
            assert (their.status_code, their.text) == (our.status_code, our.text)
            assert their.headers["content-type"] == our.headers["content-type"]


CODECS = [
    (mlflow_scoring.ScoringCodec(plane_of(graph)), LocalRunner(graph.plan))
    for graph in (FLIGHTS, PAIRS, VECTORS, BLOBS)
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from([10**400, "2013-01-01", "0001-01-01T00:00:00+05:00"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(
            ["distance", "carrier", "at", "x", "a", "b", "blob", "columns", "data", "index"]
        ),
        inner, max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip
DOCUMENT = st.dictionaries(
    st.sampled_from([*mlflow_scoring.FORMS, "params"]), JSON, min_size=1, max_size=2
)
MEDIA = st.sampled_from([b"application/json", b"text/csv"]) | st.binary(max_size=12)


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(DOCUMENT, JSON).map(lambda d: json.dumps(d).encode())
    | st.binary(max_size=40)
    | st.text(alphabet=',"\n\r\0a1distance', max_size=40).map(
        lambda t: ("distance\n" + t).encode()
    ),
    MEDIA,
)
def test_nothing_but_an_error_of_ours_comes_of_any_body(body: bytes, media: bytes):
    for codec, runner in CODECS:
        try:
            answer = codec.decode(Request("/", b"", {b"content-type": media}, body))
            if not isinstance(answer, Answer):
                answer = answer.encode(runner.run(answer.columns).outcome)
        except TwinpathError as error:
            answer = codec.refuse(error)
        assert answer.status < 500, answer.body
        if answer.status != 415:
            json.loads(answer.body)
