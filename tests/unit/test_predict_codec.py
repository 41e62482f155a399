"""The typed endpoint's codec, and that its quick way of reading rows agrees with the schema."""

import datetime as dt
import enum
import json
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, Field, field_validator

from twinpath import Graph, Node
from twinpath.errors import (
    EmptyBodyError,
    MalformedBodyError,
    NodeContractError,
    TwinpathError,
)
from twinpath.graph.columns import Columns, Outcome, RowError
from twinpath.graph.placement import Batch
from twinpath.graph.schema import Schema
from twinpath.graph.stage import Executor
from twinpath.graph.tensors import Tensor
from twinpath.online.batcher import Batcher
from twinpath.online.dataplane import DataPlane
from twinpath.online.exchange import Answer, Call, Request
from twinpath.online.protocols import predict
from twinpath.online.protocols.json_rows import (
    RowReader,
    RowWriter,
    columns_of,
    dumps,
    read_json,
    read_object,
)


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Row(BaseModel):
    x: float = Field(ge=-10, lt=10)
    count: int = Field(ge=0)
    maybe: int | None = None
    ratio: float | None = Field(None, le=1)
    name: str = "nobody"
    kind: Literal["a", "b"] = "a"
    colour: Colour = Colour.RED
    flag: bool = False
    code: str = Field("ab", min_length=2)
    at: dt.datetime = dt.datetime(2013, 1, 1)
    seen: dt.datetime | None = None
    tags: list[str] = []
    t: Annotated[NDArray[Any], Tensor("float32[2]")] = np.zeros(2, np.float32)
    w: Annotated[NDArray[Any], Tensor("uint8[1,2]")] = np.zeros((1, 2), np.uint8)


class Floats(BaseModel):
    a: float
    b: float = Field(1.0, gt=0)


NUMBER = st.one_of(
    st.integers(-3, 5),
    st.floats(-12, 12, width=32),
    st.sampled_from([10**400, 2**53 + 1, -(2**53), 2**63, "7", "nan", "inf", True, None, 1e308]),
)
TIMES = st.datetimes(timezones=st.just(dt.UTC) | st.none()).map(dt.datetime.isoformat)
ROW = st.fixed_dictionaries(
    {"x": NUMBER, "count": NUMBER},
    optional={
        "maybe": NUMBER,
        "ratio": NUMBER,
        "name": st.sampled_from(["", "é", "NaN", 7]),
        "kind": st.sampled_from(["a", "b", "c"]),
        "colour": st.sampled_from(["red", "blue", "green"]),
        "flag": st.sampled_from([True, False, 1, "no"]),
        "code": st.sampled_from(["a", "ab"]),
        "at": TIMES | st.sampled_from(["2013-01-01T05:00:00-05:00", "0001-01-01T00:00:00", 5]),
        "seen": TIMES | st.none(),
        "tags": st.just(["a"]) | st.just("a"),
        "t": st.lists(NUMBER, min_size=1, max_size=3),
        "w": st.sampled_from([[[1, 2]], [[1, 256]], [[1.0, 2]], [[True, 2]], [[True, True]], [1]]),
        "typo": st.just(1),
    },
)
GOOD = st.fixed_dictionaries(
    {"x": st.floats(-10, 9), "count": st.integers(0, 5), "at": TIMES, "flag": st.booleans()},
    optional={
        "seen": TIMES | st.none(),
        "maybe": st.integers(-5, 5) | st.none(),
        "t": st.lists(st.integers(-9, 9) | st.floats(-9, 9), min_size=2, max_size=2),
        "name": st.text(max_size=3),
        "tags": st.lists(st.text(max_size=3), max_size=2),
    },
)


def same(quick: Outcome, slow: Outcome) -> None:
    assert quick.n == slow.n
    assert not slow.errors
    assert list(quick.columns) == list(slow.columns)
    for name, values in quick.columns.items():
        assert values.dtype == slow.columns[name].dtype, name
        np.testing.assert_array_equal(values, slow.columns[name])


@settings(max_examples=400, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=3) | st.lists(GOOD, min_size=1, max_size=8))
def test_the_quick_way_agrees_with_the_schema_or_leaves_it_to_it(rows):
    schema = Schema(Row, "the input")
    body = json.dumps({"rows": rows}).encode()
    quick = RowReader(schema).quick(body)
    if quick is not None:
        same(quick, schema.from_json_rows(body))
    python, slow = RowReader(schema).rows(rows), schema.from_rows(rows)
    assert set(python.errors) == set(slow.errors)
    if slow.ok:
        same(python, slow)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(NUMBER, NUMBER), min_size=1, max_size=3))
def test_columns_agree_with_rows(pairs):
    reader = RowReader(Schema(Floats, "the input"))
    rows = [{"a": a, "b": b} for a, b in pairs]
    by_row = reader.rows(rows)
    by_column = reader.columns({"a": [a for a, _ in pairs], "b": [b for _, b in pairs]})
    assert set(by_row.errors) == set(by_column.errors)
    if by_row.ok:
        same(by_column, by_row)


def test_text_is_no_column_of_its_letters():
    class Named(BaseModel):
        name: str
        x: float

    with pytest.raises(MalformedBodyError, match="'name': expected a list"):
        RowReader(Schema(Named, "x")).columns({"name": "ab", "x": [1, 2]})
    with pytest.raises(EmptyBodyError, match="no rows"):
        RowReader(Schema(Named, "x")).columns({"name": [], "x": []})


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.fixed_dictionaries({"a": NUMBER, "b": NUMBER}), min_size=1, max_size=3)
    | st.lists(
        st.tuples(st.floats(), st.integers(1, 9)).map(lambda v: {"b": v[1], "a": v[0]}),
        min_size=1,
        max_size=4,
    )
)
def test_rows_of_floats_agree_too(rows):
    schema = Schema(Floats, "the input")
    body = json.dumps({"rows": rows}).encode()
    quick = RowReader(schema).quick(body)
    if quick is not None:
        same(quick, schema.from_json_rows(body))
    elif b"N" not in body and b"Inf" not in body:
        assert schema.from_json_rows(body).errors


def test_many_times_are_exact_to_the_microsecond():
    class Event(BaseModel):
        at: dt.datetime

    times = ["2013-12-23T22:30:00.000001Z", "1969-12-31T23:59:59.999999", "2041-05-10T01:02:03.45Z",
             "2013-07-01T00:00:00.333333+02:00", "1850-01-01T00:00:00.000007Z"]  # fmt: skip
    for more in ([], ["0001-01-01T00:00:00.000003"], ["9999-12-31T23:59:59.999999Z"]):
        rows = [{"at": at} for at in times + more]
        quick = RowReader(Schema(Event, "x")).rows(rows)
        same(quick, Schema(Event, "x").from_rows(rows))
    beyond = RowReader(Schema(Event, "x")).rows([*rows, {"at": "9999-12-31T23:59:59-05:00"}])
    assert list(beyond.errors) == [6]
    assert "years 1 to 9999" in beyond.errors[6].message


def test_good_rows_go_the_quick_way():
    rows = [
        {"x": 1, "count": 2, "at": "2013-12-23T22:30:00.000001Z", "seen": None, "t": [1, 0.1]},
        {"x": 2.5, "count": 2, "name": "é", "colour": "blue", "maybe": 3, "w": [[3, 4]]},
    ]
    schema = Schema(Row, "x")
    body = json.dumps({"rows": rows}).encode()
    quick = RowReader(schema).quick(body)
    assert quick is not None
    same(quick, schema.from_json_rows(body))
    floats = RowReader(Schema(Floats, "x")).quick(b'{"rows": [{"b": 3, "a": 1}, {"a": 2.5}]}')
    assert floats is not None
    assert {name: values.tolist() for name, values in floats.columns.items()} == {
        "a": [1.0, 2.5],
        "b": [3.0, 1.0],
    }


@pytest.mark.parametrize(
    "body",
    [
        b'{"rows": [{"a": NaN}]}',
        b'{"rows": [{"a": -Infinity}]}',
        b'{"rows": [{"a": "nan"}]}',
        b'{"rows": [{"a": 1, "typo": 1}]}',
        b'{"rows": [{"a": 1, "b": 0}]}',
        b'{"rows": [{"a": 1, "b": 1}, {"b": 0, "a": 1}]}',
        b'{"rows": [{"a": 1e999, "b": 1}]}',
        b'{"rows": [{"a": 1, "b": 1}], "more": 1}',
        b'{"rows": [{"a": 1}], "more": 1}',
        b'{"rows": []}',
        b'{"rows": [1]}',
        b"",
    ],
)
def test_the_quick_way_gives_up_on_anything_odd(body):
    assert RowReader(Schema(Floats, "x")).quick(body) is None


def test_a_model_with_code_of_its_own_is_left_to_the_schema():
    class Checked(BaseModel):
        x: float

        @field_validator("x")
        @classmethod
        def _check(cls, value: float) -> float:
            return value + 1

    class Post(BaseModel):
        x: float

        def model_post_init(self, context: Any) -> None:
            self.x = 7.0

    class Init(BaseModel):
        x: float

        def __init__(self, **given: Any) -> None:
            super().__init__(**given)
            self.x = 7.0

    for model in (Checked, Post, Init):
        reader = RowReader(Schema(model, "x"))
        assert reader.quick(b'{"rows": [{"x": 6}]}') is None
        assert reader.rows([{"x": 6}]).columns["x"].tolist() == [7.0]


def test_what_an_annotated_validator_returns_is_checked():
    class Odd(BaseModel):
        x: Annotated[float, AfterValidator(lambda value: value * 10), Field(le=20)]

    schema = Schema(Odd, "x")
    body = b'{"rows": [{"x": 1}, {"x": 3}]}'
    slow, quick = schema.from_json_rows(body), RowReader(schema).quick(body)
    assert (quick is None) == bool(slow.errors)


def test_json_is_strict():
    with pytest.raises(EmptyBodyError):
        read_json(b" ")
    for body in (b"{", b"\xff", b'{"a": 1,}', b"[" * 10_000, b'"\xed\xa0\x80"', b"1" * 10_000):
        with pytest.raises(MalformedBodyError, match="not JSON"):
            read_json(body)
    with pytest.raises(MalformedBodyError, match="NaN is not JSON"):
        read_json(b"[NaN]")
    with pytest.raises(MalformedBodyError, match="expected an object, got"):
        read_object(b"[1]", "an object")
    assert dumps([float("nan"), float("inf"), np.float32(1)]) == b"[null,null,1.0]"
    with pytest.raises(NodeContractError, match="set"):
        dumps({1, 2})


def test_columns_of_json_are_typed_by_the_schema():
    schema = Schema(Row, "x")
    columns = columns_of(
        schema,
        {"x": [1, 2], "count": [1, 2.0], "maybe": [None, 3], "at": ["2013-01-01T00:00:00Z"] * 2,
         "t": [[1, 2], [3, 4.5]], "w": [[[1, 2]], [[3, 4]]], "flag": [1, "no"]},
    )  # fmt: skip
    outcome = schema.from_columns(columns)
    assert outcome.ok, outcome.errors
    assert outcome.columns["t"].dtype == np.float32
    assert outcome.columns["flag"].tolist() == [True, False]
    for lists, says in [
        ({"x": [1], "count": [1, 2]}, "'count' has 2 rows, the first column has 1"),
        ({"x": "text"}, "'x': expected a list"),
        ({"x": 1}, "'x': expected a list"),
    ]:
        with pytest.raises(MalformedBodyError, match=says):
            columns_of(schema, lists)


def test_missing_numbers_are_null_and_whole_ones_stay_whole():
    class Out(BaseModel):
        n: int | None
        y: float | None

    rows = RowWriter(Schema(Out, "x")).rows(
        {"n": np.array([1.0, np.nan]), "y": np.array([np.nan, 0.5])}
    )
    assert dumps(rows) == b'[{"n":1,"y":null},{"n":null,"y":0.5}]'
    assert RowWriter(Schema(Out, "x")).rows({}) == []


class Answered(BaseModel):
    y: float


class Double(Node):
    inputs = {"a": "float64"}
    outputs = {"y": "float64"}

    def predict(self, columns: Columns) -> Columns:
        return {"y": columns["a"] * 2}


@pytest.fixture
def codec() -> predict.PredictCodec:
    graph = Graph("numbers", input=Floats, output=Answered)
    with graph as number:
        graph.output(Double()(number))
    executor = Executor(graph.plan)
    plane = DataPlane(graph.plan, Batcher(executor.run, Batch()))
    assert list(predict.inference(plane)) == ["/predict", "/numbers/predict"]
    assert predict.routes(plane) == []
    found = predict.inference(plane)["/predict"]
    assert isinstance(found, predict.PredictCodec)
    return found


def post(body: bytes, query: bytes = b"", **headers: str) -> Request:
    named = {name.replace("_", "-").encode(): value.encode() for name, value in headers.items()}
    return Request("/predict", query, named, body)


def test_rows_become_a_call_and_its_outcome_rows(codec):
    call = codec.decode(post(b'{"rows": [{"a": 1}, {"a": 2}]}'))
    assert isinstance(call, Call)
    assert call.columns["a"].tolist() == [1.0, 2.0]
    answer = call.encode(Outcome.success({"y": np.array([2.0, np.nan])}, 2))
    assert (answer.status, answer.body) == (200, b'{"rows":[{"y":2.0},{"y":null}]}')


def test_partial_answers_keep_positions_of_both_kinds_of_failure(codec):
    call = codec.decode(post(b'{"rows": [{"a": "?"}, {"a": 1}, {"a": 2}]}', b"on_error=partial"))
    assert isinstance(call, Call)
    ran = Outcome(2, {"y": np.array([4.0])}, np.array([1]), {0: RowError("row_failed", "no", "n")})
    document = json.loads(call.encode(ran).body)
    assert document["rows"] == [None, None, {"y": 4.0}]
    assert [(e["row"], e["code"], e["node"]) for e in document["errors"]] == [
        (0, "invalid_input", None),
        (1, "row_failed", "n"),
    ]


def test_one_bad_row_is_answered_at_once_without_a_run(codec):
    answer = codec.decode(post(b'{"rows": [{"a": "?"}, {"a": 1}]}'))
    assert isinstance(answer, Answer)
    assert answer.status == 422
    assert json.loads(answer.body)["error"]["rows"][0]["row"] == 0


def test_the_content_type_and_the_query_are_checked(codec):
    with pytest.raises(TwinpathError, match="text/csv"):
        codec.decode(post(b"{}", content_type="text/csv"))
    with pytest.raises(MalformedBodyError, match="on_error"):
        codec.decode(post(b"{}", b"on_error=maybe"))
    refused = codec.refuse(EmptyBodyError("nothing"))
    assert json.loads(refused.body) == {"error": {"code": "empty_body", "message": "nothing"}}


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=40).map(str.encode))
def test_arbitrary_bytes_are_refused_in_words(body):
    with pytest.raises(TwinpathError):
        Schema(Floats, "x").from_json_rows(body)
    assert RowReader(Schema(Floats, "x")).quick(body) is None
