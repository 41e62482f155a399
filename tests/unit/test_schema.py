"""The same rows are refused whichever way they come in."""

import datetime as dt
import enum
import json
import pickle
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, field_validator

from twinpath.errors import EmptyBodyError, GraphError, InputError, MalformedBodyError
from twinpath.graph.schema import Schema


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


class Event(BaseModel):
    at: dt.datetime


def body(rows) -> bytes:
    return json.dumps({"rows": rows}).encode()


def refused(outcome) -> dict[int, str]:
    return {row: error.field for row, error in outcome.errors.items()}


ROW = st.fixed_dictionaries(
    {
        "x": st.one_of(st.floats(-12, 12, width=32), st.just(10.0), st.just(-10.0)),
        "count": st.integers(-3, 5),
        "maybe": st.one_of(st.none(), st.integers(-5, 5)),
        "ratio": st.one_of(st.none(), st.floats(-2, 2, width=32)),
        "name": st.sampled_from(["", "x", "é", "nobody"]),
        "kind": st.sampled_from(["a", "b", "c"]),
        "colour": st.sampled_from(["red", "blue", "green"]),
        "flag": st.booleans(),
    }
)


@settings(max_examples=60, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=8))
def test_rows_columns_frame_and_json_refuse_the_same_rows(rows):
    schema = Schema(Row, "the input")
    frame = pd.DataFrame(rows)
    columns = {
        "x": np.array([r["x"] for r in rows]),
        "count": np.array([r["count"] for r in rows]),
        "maybe": np.array([r["maybe"] for r in rows], dtype=float),
        "ratio": np.array([r["ratio"] for r in rows], dtype=float),
        "name": np.array([r["name"] for r in rows], dtype=object),
        "kind": np.array([r["kind"] for r in rows], dtype=object),
        "colour": np.array([r["colour"] for r in rows], dtype=object),
        "flag": np.array([r["flag"] for r in rows]),
    }
    outcomes = [
        schema.from_rows(rows),
        schema.from_columns(columns),
        schema.from_frame(frame),
        schema.from_json_rows(body(rows)),
    ]
    first = outcomes[0]
    for outcome in outcomes:
        assert set(outcome.errors) == set(first.errors)
        assert outcome.rows.tolist() == first.rows.tolist()
        for name, values in outcome.columns.items():
            assert values.dtype == first.columns[name].dtype
            np.testing.assert_array_equal(values, first.columns[name])
    kept = [dict(rows[i]) for i in first.rows]
    assert schema.to_rows(first.columns) == kept


def test_each_bad_row_names_its_field():
    rows = [
        {"x": 1.0, "count": 1},
        {"x": 50.0, "count": 1},
        {"x": 1.0},
        {"x": 1.0, "count": "many"},
        {"x": float("nan"), "count": 1},
        {"x": float("inf"), "count": 1},
        {"x": 1.0, "count": 1, "kind": "z"},
        {"x": 1.0, "count": 1, "nmae": "me"},
        "nonsense",
        [[[]]],
        None,
    ]
    outcome = Schema(Row, "the input").from_rows(rows)
    assert outcome.rows.tolist() == [0]
    assert refused(outcome) == {
        1: "x", 2: "count", 3: "count", 4: "x", 5: "x", 6: "kind", 7: "nmae",
        8: None, 9: None, 10: None,
    }  # fmt: skip
    assert "Did you mean 'name'" in outcome.errors[7].message


@pytest.mark.parametrize("exponent", [19, 400, 5000])
def test_a_whole_number_that_no_column_can_hold_is_its_rows_error(exponent):
    value = -(10**exponent)
    outcome = Schema(Row, "the input").from_rows(
        [{"x": 1.0, "count": value}, {"x": 1, "count": 1}, {"x": 1, "count": 1, "maybe": value}]
    )
    assert outcome.rows.tolist() == [1]


def test_a_huge_number_for_a_float_is_its_rows_error():
    outcome = Schema(Row, "the input").from_rows([{"x": 10**400, "count": 1}, {"x": 1, "count": 1}])
    assert outcome.rows.tolist() == [1]


def test_an_optional_int_is_whole_in_columns_too():
    columns = {"x": np.ones(3), "count": np.ones(3, int), "maybe": np.array([1.5, 2.0, np.nan])}
    outcome = Schema(Row, "the input").from_columns(columns)
    assert refused(outcome) == {0: "maybe"}
    assert [row["maybe"] for row in Schema(Row, "x").to_rows(outcome.columns)] == [2, None]


def test_whole_numbers_with_a_gap_in_a_frame_fail_one_row_only():
    frame = pd.DataFrame({"x": [1, 2, 3], "count": [1, None, 3]})
    outcome = Schema(Row, "the input").from_frame(frame)
    assert refused(outcome) == {1: "count"}
    assert outcome.columns["count"].tolist() == [1, 3]


def test_a_frame_with_pandas_own_nulls_is_read():
    frame = pd.DataFrame(
        {
            "x": [1.0, 2.0],
            "count": [1, 2],
            "maybe": pd.array([None, 3], dtype="Int64"),
            "name": pd.array(["a", None], dtype="string"),
        }
    )
    outcome = Schema(Row, "the input").from_frame(frame)
    assert refused(outcome) == {1: "name"}
    assert np.isnan(outcome.columns["maybe"]).tolist() == [True]


def test_a_polars_frame_is_read():
    polars = pytest.importorskip("polars")
    frame = polars.DataFrame({"x": [1.0, 20.0], "count": [1, 2], "name": ["a", "b"]})
    assert refused(Schema(Row, "the input").from_frame(frame)) == {1: "x"}


def test_times_with_zones_become_utc():
    zoned = dt.datetime(2013, 1, 1, 5, tzinfo=dt.timezone(dt.timedelta(hours=-5)))
    schema = Schema(Event, "the input")
    wanted = np.array(["2013-01-01T10:00"], "datetime64[us]")
    frame = pd.DataFrame({"at": pd.to_datetime(["2013-01-01T05:00-05:00"])})
    for outcome in (
        schema.from_rows([{"at": zoned}]),
        schema.from_json_rows(body([{"at": "2013-01-01T05:00:00-05:00"}])),
        schema.from_columns({"at": np.array(["2013-01-01T10"], "datetime64[ns]")}),
        schema.from_frame(frame),
    ):
        np.testing.assert_array_equal(outcome.columns["at"], wanted)


def test_bounds_of_a_time_may_have_a_zone():
    class Recent(BaseModel):
        at: dt.datetime = Field(ge=dt.datetime(2013, 1, 1, tzinfo=dt.UTC))

    schema = Schema(Recent, "the input")
    columns = {"at": np.array(["2012-12-31", "2013-01-02"], "datetime64[us]")}
    assert refused(schema.from_columns(columns)) == {0: "at"}


def test_a_missing_time_is_refused_unless_optional():
    columns = {"at": np.array(["NaT", "2013-01-02"], "datetime64[us]")}
    assert refused(Schema(Event, "the input").from_columns(columns)) == {0: "at"}


def test_a_validator_of_the_model_looks_at_every_row_of_columns():
    class Even(BaseModel):
        n: int

        @field_validator("n")
        @classmethod
        def _even(cls, value):
            if value == 4:
                raise KeyError("four")
            if value % 2:
                raise ValueError("odd")
            return value

    schema = Schema(Even, "the input")
    outcome = schema.from_columns({"n": np.array([1, 2, 3, 4])})
    assert outcome.columns["n"].tolist() == [2]
    assert "odd" in outcome.errors[0].message
    assert "KeyError" in outcome.errors[3].message
    assert set(schema.from_rows([{"n": i} for i in (1, 2, 3, 4)]).errors) == {0, 2, 3}


def test_a_constraint_on_text_looks_at_every_row_of_columns():
    class Coded(BaseModel):
        code: str = Field(min_length=2)

    outcome = Schema(Coded, "the input").from_columns({"code": np.array(["a", "bb"], object)})
    assert refused(outcome) == {0: "code"}


def test_an_annotated_optional_keeps_its_type_and_bounds():
    class Model(BaseModel):
        p: Annotated[float, Field(ge=0)] | None = None

    schema = Schema(Model, "the input")
    assert schema.fields["p"].dtype == "float64"
    assert refused(schema.from_columns({"p": np.array([-1.0, 1.0, np.nan])})) == {0: "p"}


def test_lists_and_mixed_literals_are_columns_of_objects():
    class Model(BaseModel):
        tags: list[str]
        level: Literal["low", 1] = 1

    outcome = Schema(Model, "the input").from_rows(
        [{"tags": ["a"]}, {"tags": ["b"], "level": "low"}]
    )
    assert outcome.ok
    assert outcome.columns["tags"].tolist() == [["a"], ["b"]]


def test_a_default_factory_is_called_for_every_row():
    numbers = iter(range(100))

    class Model(BaseModel):
        x: float
        id: int = Field(default_factory=lambda: next(numbers))

    outcome = Schema(Model, "the input").from_columns({"x": np.zeros(3)})
    assert len(set(outcome.columns["id"].tolist())) == 3


def test_columns_that_are_missing_unknown_or_mistyped_are_named():
    schema = Schema(Row, "the input")
    with pytest.raises(InputError, match="column 'count' is missing"):
        schema.from_columns({"x": np.ones(1)})
    with pytest.raises(InputError, match=r"unknown column 'cuont'. Did you mean 'count'"):
        schema.from_columns({"x": np.ones(1), "cuont": np.ones(1, int)})
    with pytest.raises(InputError, match="'x': expected float64, got str"):
        schema.from_columns({"x": np.array(["a"]), "count": np.ones(1, int)})
    with pytest.raises(InputError, match="first one has 2 rows"):
        schema.from_columns({"x": np.ones(2), "count": np.ones(3, int)})
    with pytest.raises(InputError, match="'x'"):
        schema.from_columns({"x": np.array(1.0), "count": np.ones(1, int)})


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        (b"", EmptyBodyError, "empty"),
        (b"   ", EmptyBodyError, "empty"),
        (b'{"rows": []}', EmptyBodyError, "empty list"),
        (b"{", MalformedBodyError, "not JSON"),
        (b"\xff\xfe\xfa", MalformedBodyError, "not JSON"),
        (b"[1]", MalformedBodyError, "rows"),
        (b'{"row": [1]}', MalformedBodyError, "rows"),
        (b'{"rows": {}}', MalformedBodyError, "rows"),
        (b'{"rows": [{}], "x": 1}', MalformedBodyError, "unknown key 'x'"),
        (b'{"rows": [{"x": NaN}]}', MalformedBodyError, "NaN is not JSON"),
        (b"[" * 100_000, MalformedBodyError, "not JSON"),
    ],
)
def test_a_body_that_is_not_rows_says_why(text, error, says):
    with pytest.raises(error, match=says):
        Schema(Row, "the input").from_json_rows(text)


def test_the_last_of_duplicate_keys_counts():
    outcome = Schema(Row, "x").from_json_rows(b'{"rows": [{"x": 1, "x": 2, "count": 1}]}')
    assert outcome.columns["x"].tolist() == [2.0]


def test_extra_keys_are_refused_unless_the_model_allows_them():
    class Loose(BaseModel):
        model_config = ConfigDict(extra="allow")
        x: float

    assert Schema(Loose, "x").from_rows([{"x": 1, "y": 2}]).ok
    assert not Schema(Row, "x").from_rows([{"x": 1, "count": 1, "y": 2}]).ok


def test_models_are_rows_too():
    assert Schema(Row, "x").from_rows([Row(x=1, count=2)]).columns["colour"].tolist() == ["red"]


def test_what_is_no_model_is_refused():
    class Empty(BaseModel):
        pass

    class Renamed(BaseModel):
        x: float = Field(alias="X")

    for model in (dict, Empty, Row(x=1, count=1)):
        with pytest.raises(GraphError, match="pydantic model"):
            Schema(model, "the input")
    with pytest.raises(GraphError, match="alias"):
        Schema(Renamed, "the input")


def test_a_schema_pickles():
    assert pickle.loads(pickle.dumps(Schema(Row, "x"))).fields == Schema(Row, "x").fields
