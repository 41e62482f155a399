"""Requests that simdjson reads are read as the longer way reads them, or left to it."""

import json
from typing import Annotated, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import BaseModel

from twinpath import Batch, Columns, Graph, Node, Tensor
from twinpath.errors import InputError, MalformedBodyError
from twinpath.graph.stage import Executor
from twinpath.online.app import graph_app
from twinpath.online.batcher import Batcher
from twinpath.online.exchange import Call, Request
from twinpath.online.protocols import oip_rest
from twinpath.online.protocols.oip_floats import FloatTensors

WANTED = {"x": ("FP32", [3]), "w": ("FP64", list[int]())}


class Row(BaseModel):
    x: Annotated[NDArray[Any], Tensor("float32[3]")]
    w: float


class Sum(BaseModel):
    total: float


class Add(Node):
    inputs, outputs = {"x": "float32[3]", "w": "float64"}, {"total": "float64"}

    def predict(self, columns: Columns) -> Columns:
        return {"total": columns["x"].sum(1, dtype=np.float64) * columns["w"]}


@pytest.fixture(scope="module")
def codec() -> oip_rest.InferCodec:
    """A graph's that reads both tensors."""
    graph = Graph("sums", input=Row, output=Sum)
    with graph as rows:
        graph.output(Add()(rows))
    executor = Executor(graph.plan)
    executor.setup()
    batcher = Batcher(executor.run, Batch())
    plane = graph_app(graph.plan, batcher, max_body_bytes=1 << 20).frontend.plane
    return oip_rest.InferCodec(plane)


def document(x: Any, w: Any, rows: Any, **more: Any) -> dict[str, Any]:
    tensors = [
        {"name": "x", "shape": [rows, 3], "datatype": "FP32", "data": x},
        {"name": "w", "shape": [rows], "datatype": "FP64", "data": w},
    ]
    return {"inputs": tensors} | more


def longer(codec: oip_rest.InferCodec, body: bytes) -> Columns | Exception:
    """What the way over orjson makes of it."""
    floats, codec._floats = codec._floats, None
    try:
        call = codec.decode(Request("/v2/models/sums/infer", b"", {}, body))
    except (InputError, MalformedBodyError) as error:
        return error
    finally:
        codec._floats = floats
    assert isinstance(call, Call)
    return call.columns


def same(mine: Columns, theirs: Columns | Exception) -> bool:
    assert not isinstance(theirs, Exception), theirs
    assert {n: (v.dtype, v.shape) for n, v in mine.items()} == {
        n: (v.dtype, v.shape) for n, v in theirs.items()
    }
    return all(np.array_equal(values, theirs[name]) for name, values in mine.items())


numbers = st.floats(width=32, allow_nan=False, allow_infinity=False) | st.integers(-(2**70), 2**70)
odd = st.none() | st.booleans() | st.text(max_size=2) | st.lists(numbers, max_size=2)


@given(
    x=st.lists(numbers | st.floats(allow_nan=False, allow_infinity=False), max_size=9),
    w=st.lists(numbers | odd, max_size=3),
    rows=st.integers(0, 3) | odd,
)
def test_whatever_is_read_is_what_the_longer_way_reads(codec, x, w, rows):
    body = json.dumps(document(x, w, rows)).encode()
    found = FloatTensors(WANTED).columns(body)
    assert found is None or same(found, longer(codec, body))


def test_large_plain_requests_are_read_this_way(codec: oip_rest.InferCodec):
    x = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    body = json.dumps(document(x.ravel().tolist(), [1.5] * 64, 64)).encode()
    assert len(body) >= oip_rest.LEAST_BYTES
    found = FloatTensors(WANTED).columns(body)
    assert found is not None
    assert same(found, {"x": x, "w": np.full(64, 1.5)})
    call = codec.decode(Request("/v2/models/sums/infer", b"", {}, body))
    assert isinstance(call, Call)
    assert same(call.columns, found)


@pytest.mark.parametrize(
    "body",
    [
        json.dumps(document([1, 2, 3], [1], 1, id="a")),
        json.dumps(document([[1, 2, 3]], [1], 1)),
        json.dumps(document([1, 2, 3], [1], 1)).replace("FP32", "FP64"),
        json.dumps(document([1, 2, 3], [1], 1)).replace('"w"', '"x"'),
        json.dumps(document([1, 2, 3], [1], 1)).replace('"FP64"', '"FP64", "parameters": {}'),
        json.dumps(document([1, 2, 3, 4], [1], 1)),
        json.dumps(document([1, 2, 1e39], [1], 1)),
        json.dumps(document([1, 2, None], [1], 1)),
        json.dumps(document([1, 2, True], [1], 1)),
        json.dumps(document([1, 2, 3], [1, 2], 1)),
        json.dumps(document([1, 2, 3], [1], 1)) + "x",
        json.dumps(document([1, 2, 3], [1], 1)).replace("3]}", "NaN]}"),
        '{"inputs": [1, 2], "a": [], "b": [], "c": []}',
        "[[[[[",
        "",
    ],
)
def test_everything_else_is_left(body: str):
    reader = FloatTensors(WANTED)
    assert reader.columns(body.encode()) is None
    plain = json.dumps(document([1, 2, 3], [1], 1)).encode()
    assert reader.columns(plain) is not None, "and what comes next is read again"


def test_only_tensors_of_floating_point_are_read_so():
    assert FloatTensors.can_read(WANTED)
    assert not FloatTensors.can_read({**WANTED, "n": ("INT64", [])})
