"""TensorFlow Serving's REST API in front of a graph."""

import base64
import datetime as dt
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from twinpath import Graph, Node
from twinpath.errors import InputError, TwinpathError
from twinpath.graph.columns import Columns
from twinpath.graph.dtypes import ColumnType
from twinpath.graph.local import LocalRunner
from twinpath.graph.placement import Batch
from twinpath.graph.stage import Executor
from twinpath.graph.tensors import Tensor
from twinpath.online.app import GraphApp
from twinpath.online.batcher import Batcher
from twinpath.online.dataplane import DataPlane
from twinpath.online.exchange import Call, Request
from twinpath.online.frontend import Frontend
from twinpath.online.protocols import tf_serving
from twinpath.online.protocols.tf_serving import classification, regression


class Flight(BaseModel):
    distance: float = Field(ge=0)
    carrier: str
    night: bool = False
    at: dt.datetime | None = None


class Delay(BaseModel):
    p: float
    label: str


class Vector(BaseModel):
    x: Annotated[NDArray[Any], Tensor("float32[2]")]


class Total(BaseModel):
    total: float | None


class Text(BaseModel):
    text: str


class Length(BaseModel):
    n: int
    raw: bytes
    echo_bytes: str


class Guess(Node):
    inputs = {"distance": "float64", "carrier": "str"}
    outputs = {"p": "float64", "label": "str"}

    def predict(self, columns: Columns) -> Columns:
        if (columns["distance"] == 13).any():
            raise ValueError("thirteen")
        return {"p": columns["distance"] / 100, "label": columns["carrier"]}


class Add(Node):
    inputs = {"x": "float32[2]"}
    outputs = {"total": "float64"}

    def predict(self, columns: Columns) -> Columns:
        total = columns["x"].sum(axis=1).astype(np.float64)
        return {"total": np.where(total < 0, np.nan, total)}


class Count(Node):
    inputs = {"text": "str"}
    outputs = {"n": "int64", "raw": "any", "echo_bytes": "str"}

    def predict(self, columns: Columns) -> Columns:
        raw = np.empty(len(columns["text"]), object)
        raw[:] = [text.encode() for text in columns["text"]]
        return {"n": np.array([len(b) for b in raw]), "raw": raw, "echo_bytes": columns["text"]}


def graph_of(name: str, given: Any, answer: Any, node: Node) -> Graph:
    graph = Graph(name, input=given, output=answer)
    with graph as row:
        graph.output(node(row))
    return graph


FLIGHTS = graph_of("flights", Flight, Delay, Guess())
SUMS = graph_of("sums", Vector, Total, Add())
COUNTS = graph_of("counts", Text, Length, Count())


def plane_of(graph: Graph) -> DataPlane:
    executor = Executor(graph.plan)
    executor.setup()
    return DataPlane(graph.plan, Batcher(executor.run, Batch()))


def client_of(plane: DataPlane) -> httpx.AsyncClient:
    frontend = Frontend(plane, tf_serving.inference(plane), max_body_bytes=100_000)
    transport = httpx.ASGITransport(app=GraphApp(frontend, tf_serving.routes(plane)))
    return httpx.AsyncClient(transport=transport, base_url="http://test/v1/models")


@pytest.fixture
async def flights() -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(plane_of(FLIGHTS)) as client:
        yield client


async def ask(client: httpx.AsyncClient, path: str, document: Any) -> Any:
    answer = await client.post(path, json=document)
    assert answer.status_code == 200, answer.text
    return answer.json()


ROWS = [{"distance": 10, "carrier": "UA"}, {"distance": 20.0, "carrier": "é", "night": True}]


@pytest.mark.parametrize("place", ["flights", "flights/versions/1"])
async def test_rows_by_name(flights: httpx.AsyncClient, place: str):
    wanted = {"predictions": [{"p": 0.1, "label": "UA"}, {"p": 0.2, "label": "é"}]}
    assert await ask(flights, f"/{place}:predict", {"instances": ROWS}) == wanted
    named = {"signature_name": "serving_default", "instances": ROWS}
    assert await ask(flights, f"/{place}:predict", named) == wanted


async def test_columns_by_name(flights: httpx.AsyncClient):
    inputs = {
        "distance": [10, 20],
        "carrier": ["UA", {"b64": base64.b64encode("é".encode()).decode()}],
        "at": ["2013-01-01T00:00:00Z", None],
    }
    answer = await ask(flights, "/flights:predict", {"inputs": inputs})
    assert answer == {"outputs": {"p": [0.1, 0.2], "label": ["UA", "é"]}}


async def test_one_input_and_one_output_are_bare():
    async with client_of(plane_of(SUMS)) as client:
        for instances in ([[1, 2], [3, -4.5]], [{"x": [1, 2]}, {"x": [3, -4.5]}]):
            answer = await ask(client, "/sums:predict", {"instances": instances})
            assert answer == {"predictions": [3.0, None]}
        for inputs in ([[1, 2], [3, -4.5]], {"x": [[1, 2], [3, -4.5]]}):
            answer = await ask(client, "/sums:predict", {"inputs": inputs})
            assert answer == {"outputs": [3.0, None]}


async def test_bytes_travel_as_base64_both_ways():
    given = {"b64": base64.b64encode("ü".encode()).decode()}
    wanted = {"n": 2, "raw": given, "echo_bytes": given}
    async with client_of(plane_of(COUNTS)) as client:
        for instance in (given, "ü", {"text": given}, {"text": "ü"}):
            answer = await ask(client, "/counts:predict", {"instances": [instance]})
            assert answer == {"predictions": [wanted]}
        answer = await ask(client, "/counts:predict", {"inputs": [given]})
        assert answer == {"outputs": {name: [value] for name, value in wanted.items()}}


async def test_examples_are_classified_and_regressed(flights: httpx.AsyncClient):
    document = {"context": {"carrier": "UA"}, "examples": [{"distance": [10]}, ROWS[1]]}
    answer = await ask(flights, "/flights:classify", document)
    assert answer == {"result": [[["UA", 0.1]], [["é", 0.2]]]}
    answer = await ask(flights, "/flights/versions/1:regress", document)
    assert answer == {"result": [0.1, 0.2]}
    async with client_of(plane_of(COUNTS)) as client:
        refused = await client.post("/counts:classify", json={"examples": [{"text": "a"}]})
        assert refused.status_code == 400
        assert "use :predict" in refused.json()["error"]


def test_outputs_are_read_as_classes_and_scores():
    f64, text, many = ColumnType("float64"), ColumnType("str"), ColumnType("any", None)
    objects = np.empty(1, object)
    objects[0] = ["a", b"b"]
    scores = np.array([[0.25, 0.75]])
    for outputs, columns, wanted in [
        ({"classes": many, "scores": ColumnType("float64", (2,))},
         {"classes": objects, "scores": scores}, [[["a", 0.25], ["b", 0.75]]]),
        ({"s": ColumnType("float64", (2,))}, {"s": scores}, [[["", 0.25], ["", 0.75]]]),
        ({"a": f64, "b": f64}, {"a": scores[:, 0], "b": scores[:, 1]},
         [[["a", 0.25], ["b", 0.75]]]),
        ({"late": ColumnType("bool"), "p": f64}, {"late": np.array([True]), "p": scores[:, 0]},
         [[["true", 0.25]]]),
    ]:  # fmt: skip
        assert classification(outputs)(columns) == wanted
    assert regression({"a": f64, "b": text})({"a": scores[:, 0]}) == [0.25]
    assert regression({"s": ColumnType("float32", (1,))})({"s": scores[:, :1]}) == [0.25]
    assert regression({"n": ColumnType("int64")})({"n": np.array([3])}) == [3]
    for reading in (classification, regression):
        with pytest.raises(InputError, match=r"outputs are a \(str\), b \(str\): use :predict"):
            reading({"a": text, "b": text})
    with pytest.raises(InputError, match="exactly one float"):
        regression({"a": f64, "b": f64})


async def test_status_and_metadata(flights: httpx.AsyncClient):
    for place in ("flights", "flights/versions/1"):
        status = (await flights.get("/" + place)).json()
        assert status == {
            "model_version_status": [
                {
                    "version": "1",
                    "state": "AVAILABLE",
                    "status": {"error_code": "OK", "error_message": ""},
                }
            ],
            # These two are KServe's.
            "name": "flights",
            "ready": True,
        }
        metadata = (await flights.get(f"/{place}/metadata")).json()
        assert metadata["model_spec"] == {"name": "flights", "signature_name": "", "version": "1"}
        signature = metadata["metadata"]["signature_def"]["signature_def"]["serving_default"]
        assert signature["method_name"] == "tensorflow/serving/predict"
        assert {name: info["dtype"] for name, info in signature["inputs"].items()} == {
            "distance": "DT_DOUBLE", "carrier": "DT_STRING", "night": "DT_BOOL", "at": "DT_STRING",
        }  # fmt: skip
    async with client_of(plane_of(SUMS)) as client:
        metadata = (await client.get("/sums/metadata")).json()
    signature = metadata["metadata"]["signature_def"]["signature_def"]["serving_default"]
    assert signature["inputs"]["x"] == {
        "dtype": "DT_FLOAT",
        "tensor_shape": {
            "dim": [{"size": "-1", "name": ""}, {"size": "2", "name": ""}],
            "unknown_rank": False,
        },
        "name": "x:0",
    }


async def test_a_model_out_of_service_says_so():
    plane = plane_of(SUMS)
    plane.loaded = False
    async with client_of(plane) as client:
        status = (await client.get("/sums")).json()["model_version_status"][0]
        assert (status["state"], "unloaded" in status["status"]["error_message"]) == ("END", True)
        answer = await client.post("/sums:predict", json={"instances": [[1, 2]]})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")


@pytest.mark.parametrize(
    ("method", "path", "status", "says"),
    [
        ("GET", "/flihgts", 404, "Did you mean 'flights'?"),
        ("GET", "/flights/versions/9", 404, "no version '9'; it has: 1"),
        ("GET", "/flights/versions/9/metadata", 404, "no version '9'"),
        ("GET", "/flights/labels/stable", 404, "expected flights, or"),
        ("POST", "/other:predict", 404, "no model 'other'"),
        ("POST", "/flights/versions/9:predict", 404, "no version '9'"),
        ("POST", "/flights:predikt", 404, "Did you mean 'predict'?"),
        ("POST", "/flights", 405, "expected GET"),
        ("GET", "/flights:predict", 405, "expected POST"),
    ],
)
async def test_what_is_not_here_is_named(flights, method: str, path: str, status: int, says: str):
    answer = await flights.request(method, path)
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    assert says in answer.json()["error"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "empty"),
        (b"[1]", 'expected {"instances"'),
        (b"{}", "got neither"),
        (b'{"instances": [], "inputs": []}', "send exactly one"),
        (b'{"instances": {}}', '"instances": expected a list'),
        (b'{"instances": []}', "empty list"),
        (b'{"inputs": {}}', "no rows"),
        (b'{"inputs": {"distance": [], "carrier": []}}', "no rows"),
        (b'{"instances": [1]}', "bare value 1, and this model has the inputs 'distance'"),
        (b'{"instances": [1, {}]}', "mixes"),
        (b'{"instance": [1]}', "Did you mean 'instances'?"),
        (b'{"signature_name": "other", "instances": [1]}', "'serving_default'"),
        (b'{"instances": [{"distance": NaN, "carrier": "a"}]}', "NaN is not JSON"),
        (b'{"instances": [{"distance": -1, "carrier": "a"}]}', "distance"),
        (b'{"instances": [{"distance": 13, "carrier": "a"}]}', "thirteen"),
        (b'{"instances": [{"distance": 1, "carrier": {"b64": "?"}}]}', "base64, got '?'"),
        (b'{"instances": [{"distance": 1, "carrier": {"b64": 7}}]}', "base64, got 7"),
        (b'{"inputs": {"distance": [1], "carrier": [{"b64": "/w=="}]}}', "carrier"),
        (b'{"inputs": {"distance": [1, 2], "carrier": ["a"]}}', "'carrier' has 1 rows"),
        (b'{"inputs": {"distance": 1, "carrier": "a"}}', "expected a list"),
        (b'{"inputs": {"distance": [1], "carier": ["a"]}}', "Did you mean 'carrier'?"),
        (b'{"inputs": {"distance": [[1]], "carrier": ["a"]}}', "distance"),
    ],
)
async def test_bad_requests_name_what_was_expected(flights, body: bytes, says: str):
    answer = await flights.post("/flights:predict", content=body)
    assert answer.status_code == 400, answer.text
    assert list(answer.json()) == ["error"]
    assert says in answer.json()["error"]


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ({"examples": 1}, '"examples": expected a list'),
        ({"examples": []}, "empty list"),
        ({"examples": [1]}, "row 0"),
        ({"examples": [{}], "context": 1}, '"context": expected an object'),
        ({"instances": [{}]}, "unknown key 'instances'"),
    ],
)
async def test_bad_examples_name_what_was_expected(flights, document: Any, says: str):
    answer = await flights.post("/flights:regress", json=document)
    assert answer.status_code == 400, answer.text
    assert says in answer.json()["error"]


CODECS = [
    (codec, LocalRunner(graph.plan))
    for graph in (FLIGHTS, SUMS, COUNTS)
    for codec in tf_serving.inference(plane_of(graph)).values()
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from([10**400, "2013-01-01", "0001-01-01T00:00:00+05:00"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["distance", "carrier", "at", "x", "text", "b64", "night"]), inner,
        max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip
DOCUMENT = st.dictionaries(
    st.sampled_from(["instances", "inputs", "examples", "context", "signature_name"]), JSON,
    min_size=1, max_size=2,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.one_of(DOCUMENT, JSON).map(lambda d: json.dumps(d).encode()) | st.binary(max_size=40))
def test_nothing_but_an_error_of_ours_comes_of_any_body(body: bytes):
    for codec, runner in CODECS:
        try:
            call = codec.decode(Request("/", b"", {}, body))
            assert isinstance(call, Call)
            answer = call.encode(runner.run(call.columns).outcome)
        except TwinpathError as error:
            answer = codec.refuse(error)
        assert answer.status < 500, answer.body
        json.loads(answer.body)
