"""Open Inference Protocol over REST: what goes in comes out, and nothing hostile gets through."""

import gzip
import json
import re
import zlib
from typing import Annotated, Any, Literal

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from twinpath import Batch, Columns, Graph, Node, Tensor
from twinpath.errors import InputError, TwinpathError
from twinpath.graph.stage import Executor
from twinpath.online.app import GraphApp, graph_app
from twinpath.online.batcher import Batcher
from twinpath.online.exchange import Call, Request
from twinpath.online.protocols.oip_rest import InferCodec
from twinpath.online.protocols.oip_tensors import NUMPY, from_json, from_raw, to_raw

TENSORS = {name: dtype for name, dtype in NUMPY.items() if name not in ("BF16", "BYTES")}


class Wide(BaseModel):
    """A tensor of every numeric type, and every other kind of column."""

    BOOL: Annotated[NDArray[Any], Tensor("bool[2]")]
    INT8: Annotated[NDArray[Any], Tensor("int8[2]")]
    INT16: Annotated[NDArray[Any], Tensor("int16[2]")]
    INT32: Annotated[NDArray[Any], Tensor("int32[2]")]
    INT64: Annotated[NDArray[Any], Tensor("int64[2]")]
    UINT8: Annotated[NDArray[Any], Tensor("uint8[2]")]
    UINT16: Annotated[NDArray[Any], Tensor("uint16[2]")]
    UINT32: Annotated[NDArray[Any], Tensor("uint32[2]")]
    UINT64: Annotated[NDArray[Any], Tensor("uint64[2]")]
    FP16: Annotated[NDArray[Any], Tensor("float16[2]")]
    FP32: Annotated[NDArray[Any], Tensor("float32[2]")]
    FP64: Annotated[NDArray[Any], Tensor("float64[2]")]
    text: str = ""
    note: str | None = None


class Copy(Node):
    def predict(self, columns: Columns) -> Columns:
        return {}


class Small(BaseModel):
    x: Annotated[NDArray[Any], Tensor("float32[3]")]
    kind: Literal["a", "b"] = "a"
    weight: float = Field(1.0, gt=0)


class Scores(BaseModel):
    scores: Annotated[NDArray[Any], Tensor("float32[3]")]
    best: int


class Score(Node):
    inputs = {"x": "float32[3]", "weight": "float64"}
    outputs = {"scores": "float32[3]", "best": "int64"}

    def predict(self, columns: Columns) -> Columns:
        if (columns["x"] == 13).any():
            raise ValueError("thirteen")
        scores = (columns["x"] * columns["weight"][:, None]).astype(np.float32)
        return {"scores": scores, "best": scores.argmax(1)}


def app_of(name: str, given: type[BaseModel], answer: type[BaseModel], node: Node) -> GraphApp:
    graph = Graph(name, input=given, output=answer)
    with graph as rows:
        graph.output(node(rows))
    executor = Executor(graph.plan)
    executor.setup()
    return graph_app(graph.plan, Batcher(executor.run, Batch()), max_body_bytes=1 << 20)


@pytest.fixture
def wide() -> GraphApp:
    return app_of("wide", Wide, Wide, Copy())


@pytest.fixture
def scores() -> GraphApp:
    return app_of("scores", Small, Scores, Score())


def client(app: GraphApp) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x")


def tensor(name: str, datatype: str, shape: list[int], data: Any = None, **more: Any) -> Any:
    made = {"name": name, "datatype": datatype, "shape": shape} | more
    return made if data is None else made | {"data": data}


X = tensor("x", "FP32", [1, 3], [1, 5, 2])


def every_dtype(rows: int) -> dict[str, NDArray[Any]]:
    made = {}
    random = np.random.default_rng(0)
    for name, dtype in TENSORS.items():
        if dtype.kind in "iu":
            limits = np.iinfo(dtype)
            made[name] = random.integers(limits.min, limits.max, (rows, 2), dtype, endpoint=True)
        elif dtype.kind == "b":
            made[name] = random.random((rows, 2)) < 0.5
        else:
            made[name] = random.standard_normal((rows, 2)).astype(dtype)
    return made


@pytest.mark.parametrize("binary_in", [False, True])
@pytest.mark.parametrize("binary_out", [False, True])
async def test_every_datatype_goes_through_unchanged(
    wide: GraphApp, binary_in: bool, binary_out: bool
):
    given = every_dtype(3)
    text = ["", "ä", "日本"]
    inputs, tail = [], b""
    for name, values in given.items():
        raw = to_raw(values)
        if binary_in:
            size = {"binary_data_size": len(raw)}
            inputs.append(tensor(name, name, [3, 2], parameters=size))
            tail += raw
        else:
            inputs.append(tensor(name, name, [3, 2], values.ravel().tolist()))
    inputs.append(tensor("text", "BYTES", [3, 1], text))
    document: dict[str, Any] = {"id": "7", "inputs": inputs}
    if binary_out:
        document["parameters"] = {"binary_data_output": True}
    head = json.dumps(document).encode()
    async with client(wide) as session:
        answer = await session.post(
            "/v2/models/wide/infer",
            content=head + tail,
            headers={"inference-header-content-length": str(len(head))} if binary_in else {},
        )
    assert answer.status_code == 200, answer.text
    size = int(answer.headers.get("inference-header-content-length", len(answer.content)))
    found = json.loads(answer.content[:size])
    assert (found["model_name"], found["model_version"], found["id"]) == ("wide", "1", "7")
    at = size
    for output in found["outputs"]:
        name = output["name"]
        if binary_out:
            count = output["parameters"]["binary_data_size"]
            raw = memoryview(answer.content)[at : at + count]
            at += count
            values = from_raw(name, output["datatype"], output["shape"], raw)
        else:
            values = from_json(name, output["datatype"], output["shape"], output["data"])
        if name in given:
            assert output["datatype"] == name
            assert values.tobytes() == given[name].tobytes()
        elif name == "text":
            wanted = [t.encode() for t in text] if binary_out else text
            assert values.tolist() == wanted
    assert at == len(answer.content)


async def test_only_the_outputs_that_were_asked_for(scores: GraphApp):
    asked = [{"name": "best"}, {"name": "scores", "parameters": {"classification": 2}}]
    async with client(scores) as session:
        answer = await session.post(
            "/v2/models/scores/versions/1/infer", json={"inputs": [X], "outputs": asked}
        )
    best, top = answer.json()["outputs"]
    assert (best["name"], best["datatype"], best["data"]) == ("best", "INT64", [1])
    assert (top["datatype"], top["shape"]) == ("BYTES", [1, 2])
    assert top["data"] == ["5.000000:1", "2.000000:2"]


async def test_null_and_nan_are_each_others(scores: GraphApp):
    inputs = [tensor("x", "FP32", [1, 3], [None, 1, 2])]
    async with client(scores) as session:
        answer = await session.post("/v2/models/scores/infer", json={"inputs": inputs})
    assert answer.json()["outputs"][0]["data"] == [None, 1.0, 2.0]


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_bodies_may_be_compressed_both_ways(scores: GraphApp, encoding: str):
    rows = 200
    inputs = [tensor("x", "FP32", [rows, 3], [1.0, 2.0, 3.0] * rows)]
    body = json.dumps({"inputs": inputs}).encode()
    packed = gzip.compress(body) if encoding == "gzip" else zlib.compress(body)
    headers = {"content-encoding": encoding, "accept-encoding": "gzip"}
    async with client(scores) as session:
        answer = await session.post("/v2/models/scores/infer", content=packed, headers=headers)
    assert answer.headers["content-encoding"] == "gzip"
    assert answer.json()["outputs"][1]["data"] == [2] * rows


async def test_a_small_body_that_inflates_without_end_is_refused(scores: GraphApp):
    bomb = gzip.compress(b" " * (80 * 1024 * 1024))
    headers = {"content-encoding": "gzip"}
    async with client(scores) as session:
        answer = await session.post("/v2/models/scores/infer", content=bomb, headers=headers)
    assert answer.status_code == 413
    assert "inflates to more than" in answer.json()["error"]


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ([], "expected {"),
        ({}, "expected {"),
        ({"inputs": []}, "expected {"),
        ({"inputs": [3]}, "must have a name"),
        ({"inputs": [X | {"name": "y"}]}, "unknown input 'y'"),
        ({"inputs": [X, X]}, "given twice"),
        ({"inputs": [X | {"datatype": "FP33"}]}, "datatype 'FP33' is none of BOOL"),
        ({"inputs": [X | {"datatype": ["FP32"]}]}, "is none of"),
        ({"inputs": [X | {"datatype": "FP64"}]}, "expected FP32, got FP64"),
        ({"inputs": [X | {"shape": [3]}]}, r"expected shape \[-1, 3\], got \[3\]"),
        ({"inputs": [X | {"shape": [-1, 3]}]}, "list of whole numbers"),
        ({"inputs": [X | {"shape": [True, 3]}]}, "list of whole numbers"),
        ({"inputs": [X | {"shape": [2**40, 2**40]}]}, "list of whole numbers"),
        ({"inputs": [X | {"shape": [2, 3]}]}, "needs 6 values, data has 3"),
        ({"inputs": [X | {"data": ["1", "2", "3"]}]}, "does not hold FP32"),
        ({"inputs": [X | {"data": [[1, 2], [3]]}]}, "lists of different lengths"),
        ({"inputs": [X | {"data": [1, {}, 3]}]}, "does not hold FP32"),
        ({"inputs": [tensor("x", "FP32", [1, 3])]}, "neither data nor binary_data_size"),
        ({"inputs": [tensor("x", "FP32", [1, 3], parameters={"binary_data_size": 12})]},
         "more than the body has"),
        ({"inputs": [tensor("kind", "BYTES", [1], ["a"])]}, "column 'x' is missing"),
        ({"inputs": [X, tensor("kind", "BYTES", [1], ["c"])]}, "kind: expected one of"),
        ({"inputs": [X, tensor("kind", "INT8", [1], [1])]}, "expected BYTES, got INT8"),
        ({"inputs": [X, tensor("weight", "FP64", [2], [1, 1])]}, "has 2 rows and 'x' has 1"),
        ({"inputs": [X, tensor("weight", "FP64", [1], [-1])]}, "weight: expected gt 0"),
        ({"inputs": [X], "outputs": [{"name": "bets"}]}, "Did you mean 'best'"),
        ({"inputs": [X], "outputs": [{"name": "best", "parameters": {"classification": 1}}]},
         "has no classes"),
        ({"inputs": [X], "parameters": 3}, '"parameters" must be an object'),
        ({"inputs": [X], "parameters": {"sequence_id": 4}}, "sequences are not kept"),
        ({"inputs": [X], "parameters": {"timeout": "soon"}}, "expected microseconds"),
        ({"inputs": [tensor("x", "FP32", [1, 3], [13, 0, 0])]}, "thirteen"),
    ],
)  # fmt: skip
async def test_bad_requests_are_refused_with_what_was_expected(
    scores: GraphApp, document: Any, says: str
):
    async with client(scores) as session:
        answer = await session.post("/v2/models/scores/infer", json=document)
    assert 400 <= answer.status_code < 500
    assert list(answer.json()) == ["error"]
    assert re.search(says, answer.json()["error"]), answer.json()


@pytest.mark.parametrize(
    ("datatype", "data"),
    [("INT8", [128]), ("UINT8", [-1]), ("INT64", [1.5]), ("INT32", ["1"]), ("BOOL", [2]),
     ("INT64", [2**70]), ("UINT64", [2**64]), ("UINT64", [2**63, 1.5]), ("UINT64", [2**63, -1]),
     ("BYTES", [1]), ("FP32", [10**400])],
)  # fmt: skip
def test_no_value_is_bent_into_a_datatype(datatype: str, data: list[Any]):
    with pytest.raises(TwinpathError, match="does not hold"):
        from_json("x", datatype, [1], data)


@given(hnp.arrays(np.float32, 20, elements=st.floats(width=32)))
def test_bfloat16_is_the_nearest_one(values: NDArray[np.float32]):
    back = from_raw("x", "BF16", [20], memoryview(to_raw(values, "BF16")))
    with np.errstate(all="ignore"):
        error = np.abs(back - values)
        finite = np.isfinite(values) & np.isfinite(back)
        assert (error[finite] <= np.abs(values[finite]) * 2.0**-8 + 1e-38).all()
    assert (np.isnan(back) == np.isnan(values)).all()


async def test_the_server_and_the_model_describe_themselves(scores: GraphApp):
    async with client(scores) as session:
        assert (await session.get("/v2/health/live")).json() == {"live": True}
        assert (await session.get("/v2/health/ready")).status_code == 200
        assert "binary_tensor_data" in (await session.get("/v2")).json()["extensions"]
        known = (await session.get("/v2/models/scores")).json()
        assert known["inputs"][0] == {"name": "x", "datatype": "FP32", "shape": [-1, 3]}
        assert known["versions"] == ["1"]
        for path in ("/v2/models/score", "/v2/models/scores/versions/9", "/v2/models/score/ready"):
            missing = await session.get(path)
            assert missing.status_code == 404
            assert "score" in missing.json()["error"]
        wrong = await session.post("/v2/models/score/infer", json={"inputs": [X]})
        assert wrong.status_code == 404
        assert "Did you mean 'scores'" in wrong.json()["error"]


async def test_statistics_count_what_was_served(scores: GraphApp):
    async with client(scores) as session:
        for _ in range(3):
            await session.post("/v2/models/scores/infer", json={"inputs": [X]})
        await session.post("/v2/models/scores/infer", json={"inputs": []})
        [stats] = (await session.get("/v2/models/scores/stats")).json()["model_stats"]
    assert (stats["inference_count"], stats["execution_count"]) == (3, 3)
    assert stats["inference_stats"]["success"]["count"] == 3
    assert stats["inference_stats"]["fail"]["count"] == 1
    assert stats["inference_stats"]["compute_infer"]["ns"] > 0
    assert [b["batch_size"] for b in stats["batch_stats"]] == [1]


async def test_a_model_can_be_taken_out_of_service_and_back(scores: GraphApp):
    async with client(scores) as session:
        assert (await session.post("/v2/repository/models/scores/unload")).status_code == 200
        [entry] = (await session.post("/v2/repository/index")).json()
        assert entry["state"] == "UNAVAILABLE"
        ready = await session.post("/v2/repository/index", json={"ready": True})
        assert (ready.status_code, ready.json()) == (200, [])
        wrong = await session.post("/v2/repository/index", json={"ready": "yes"})
        assert wrong.status_code == 400
        assert (await session.get("/v2/models/scores/ready")).status_code == 503
        refused = await session.post("/v2/models/scores/infer", json={"inputs": [X]})
        assert refused.status_code == 503
        assert "load it first" in refused.json()["error"]
        assert (await session.post("/v2/repository/models/nope/load")).status_code == 404
        assert (await session.post("/v2/repository/models/scores/load")).status_code == 200
        again = await session.post("/v2/models/scores/infer", json={"inputs": [X]})
        assert again.status_code == 200
        [entry] = (await session.post("/v2/repository/index", json={"ready": True})).json()
        assert entry["state"] == "READY"


def codec() -> InferCodec:
    return InferCodec(app_of("scores", Small, Scores, Score()).frontend.plane)


CODEC = codec()
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=8,
)
tensors = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["x", "kind", "weight"]) | json_values,
        "datatype": st.sampled_from(list(NUMPY)) | json_values,
        "shape": st.lists(st.integers(-2, 4), max_size=3) | json_values,
        "data": st.lists(st.integers() | st.floats() | st.text(max_size=2), max_size=6)
        | json_values,
        "parameters": st.dictionaries(st.just("binary_data_size"), st.integers() | json_values),
    },
)
documents = st.fixed_dictionaries(
    {"inputs": st.lists(tensors, max_size=3) | json_values},
    optional={"outputs": json_values, "parameters": json_values, "id": json_values},
)


@settings(max_examples=400, deadline=None)
@given(documents, st.binary(max_size=40), st.booleans())
def test_nothing_but_our_own_errors_whatever_is_sent(document: Any, tail: bytes, binary: bool):
    head = json.dumps(document).encode()
    headers = {b"inference-header-content-length": str(len(head)).encode()} if binary else {}
    request = Request("/v2/models/scores/infer", b"", headers, head + (tail if binary else b""))
    refused = None
    try:
        assert isinstance(CODEC.decode(request), Call)
    except TwinpathError as error:
        refused = error
    if refused is not None:
        answer = CODEC.refuse(refused)
        assert 400 <= answer.status < 500
        assert json.loads(answer.body)["error"]


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(list(NUMPY)),
    st.lists(st.integers(-1, 2**62), min_size=1, max_size=4)
    | st.lists(st.integers(0, 3), max_size=4),
    st.binary(max_size=64),
)
def test_no_bytes_break_the_binary_decoder(datatype: str, shape: list[int], raw: bytes):
    try:
        values = from_raw("x", datatype, shape, memoryview(raw))
    except TwinpathError:
        return
    assert list(values.shape) == shape


class Pair(BaseModel):
    x: Annotated[NDArray[Any], Tensor("float32[2]")]
    k: Annotated[NDArray[Any], Tensor("int16[1]")]


class Everything(BaseModel):
    x: Annotated[NDArray[Any], Tensor("float32[2]")]
    k: Annotated[NDArray[Any], Tensor("int16[1]")]
    note: str
    size: float


class Describe(Node):
    inputs = {"x": "float32[2]"}
    outputs = {"note": "str", "size": "float64"}

    def predict(self, columns: Columns) -> Columns:
        notes = np.array([f"{row}" for row in columns["x"].tolist()], dtype=object)
        return {"note": notes, "size": columns["x"].sum(1, dtype=np.float64)}


PAIRS = app_of("pairs", Pair, Everything, Describe())


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(width=32), st.floats(width=32), st.integers(-(2**15), 2**15 - 1)),
        min_size=1, max_size=4,
    )
)  # fmt: skip
async def test_the_plain_way_answers_byte_for_byte_like_the_other(rows: list[Any]):
    finite = [[x if np.isfinite(x) else 0.5, y if np.isfinite(y) else 0.5, k] for x, y, k in rows]
    inputs = [
        tensor("x", "FP32", [len(rows), 2], [v for x, y, _ in finite for v in (x, y)]),
        tensor("k", "INT16", [len(rows), 1], [k for *_, k in finite]),
    ]
    path = "/v2/models/pairs/infer"
    async with client(PAIRS) as session:
        del session.headers["accept-encoding"]
        plain = await session.post(path, json={"inputs": inputs})
        outputs = [{"name": name} for name in ("x", "k", "note", "size")]
        other = await session.post(path, json={"inputs": inputs, "outputs": outputs})
    assert plain.status_code == other.status_code == 200
    assert plain.content == other.content


def slowly(datatype: str, values: list[Any]) -> NDArray[Any] | None:
    """What the numbers of a tensor are, read one by one; None for one that does not belong."""
    wanted = TENSORS[datatype]
    read: list[Any] = []
    for value in values:
        if wanted.kind == "b":
            fits = value in (0, 1) and type(value) in (bool, int)
        elif wanted.kind == "f":
            fits = value is None or type(value) in (int, float)
            value = float("nan") if value is None else value
        else:
            limits = np.iinfo(wanted)
            fits = type(value) is int and limits.min <= value <= limits.max
        if not fits:
            return None
        with np.errstate(over="ignore"):
            read.append(wanted.type(value))
    return np.array(read, dtype=wanted)


whole_numbers = st.integers(-(2**64), 2**64 - 1) | st.sampled_from(
    [0, 1, 127, 128, -129, 255, 256, 2**31, 2**53 + 1, -(2**53) - 1, 2**63 - 1, 2**63, 2**64 - 1]
)
floats = st.floats(allow_nan=False, allow_infinity=False, width=32)
mixed = st.lists(
    st.integers(-3, 3) | floats | st.none() | st.booleans() | st.just("1"), min_size=1, max_size=6
)
one_kind = st.one_of(
    *(st.lists(kind, min_size=1, max_size=6) for kind in (whole_numbers, floats, st.booleans()))
)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(TENSORS)), one_kind | mixed, st.booleans(), st.booleans())
def test_numbers_are_read_at_once_as_one_by_one(
    datatype: str, values: list[Any], nested: bool, told: bool
):
    wanted = slowly(datatype, values) if "1" not in values else None
    if TENSORS[datatype].kind == "f" and any(type(v) is int and abs(v) > 2**53 for v in values):
        return  # how they are rounded is numpy's affair
    data = [[value] for value in values] if nested else values
    may_hold_bools = not told or any(type(value) is bool for value in values)
    shape = [len(values), 1]
    try:
        with np.errstate(over="ignore"):
            found = from_json("x", datatype, shape, data, may_hold_bools=may_hold_bools)
    except InputError:
        assert wanted is None
    else:
        assert wanted is not None, found
        assert found.dtype == TENSORS[datatype]
        np.testing.assert_array_equal(found.ravel(), wanted)
