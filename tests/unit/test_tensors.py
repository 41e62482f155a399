"""Tensor fields: arrays in rows and columns, checked for dtype and shape and nothing else."""

from typing import Annotated, Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import BaseModel

from twinpath import Columns, Graph, Node, Tensor
from twinpath.errors import GraphError, InputError
from twinpath.graph.dtypes import ColumnType


class Picture(BaseModel):
    x: Annotated[NDArray[Any], Tensor("float32[2,2]")]
    label: str = ""


class Sum(BaseModel):
    total: float
    flat: Annotated[NDArray[Any], Tensor("float32[4]")]


class Adder(Node):
    inputs = {"x": "float32[2,2]"}
    outputs = {"total": "float64", "flat": "float32[4]"}

    def predict(self, columns: Columns) -> Columns:
        x = columns["x"]
        return {"total": x.sum((1, 2), dtype=np.float64), "flat": x.reshape(len(x), 4)}


def graph() -> Graph:
    made = Graph("sum", input=Picture, output=Sum)
    with made as picture:
        made.output(Adder()(picture))
    return made


def test_rows_may_hold_lists_or_arrays_and_answers_are_lists():
    rows = [{"x": [[1, 2], [3, 4]]}, {"x": np.ones((2, 2), np.float32)}]
    assert graph().run(rows).rows() == [
        {"total": 10.0, "flat": [1.0, 2.0, 3.0, 4.0]},
        {"total": 4.0, "flat": [1.0] * 4},
    ]


def test_a_column_is_one_array():
    x = np.arange(12, dtype=np.float32).reshape(3, 2, 2)
    result = graph().run({"x": x})
    assert result.columns["flat"].tolist() == x.reshape(3, 4).tolist()


def test_single_numbers_are_not_looked_at():
    x = np.full((1, 2, 2), np.nan, np.float32)
    assert np.isnan(graph().run({"x": x}).columns["flat"]).all()


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([[1, 2], [3]], "lists of different lengths"),
        ([1, 2, 3, 4], r"expected shape \(2, 2\), got \(4,\)"),
        ([["a", "b"], ["c", "d"]], "expected float32\\[2,2\\], got values of type"),
        (None, "expected shape"),
    ],
)
def test_a_wrong_value_is_its_rows_own_error(value: Any, says: str):
    result = graph().run([{"x": [[0, 0], [0, 0]]}, {"x": value}])
    assert list(result.errors) == [1]
    with pytest.raises(InputError, match=says):
        result.raise_for_errors()


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (np.ones((2, 4), np.float32), "expected float32"),
        (np.ones((2, 2, 2), np.float64), "expected float32"),
    ],
)
def test_a_wrong_column_is_refused(x: NDArray[Any], says: str):
    with pytest.raises(InputError, match=says):
        graph().run({"x": x})


@pytest.mark.parametrize(
    ("spec", "value", "says"),
    [
        ("uint8[2]", [1, 256], "beyond its range"),
        ("int64[2]", [1.5, 2], "got values of type float64"),
        ("bool[1]", [1], "got values of type int64"),
    ],
)
def test_no_value_is_lost_on_the_way_into_a_tensor(spec: str, value: Any, says: str):
    with pytest.raises(ValueError, match=says):
        Tensor(spec)._validate(value)


@pytest.mark.parametrize("spec", ["str[2]", "any", "float33[2]", "datetime64[us]"])
def test_only_numbers_make_a_tensor(spec: str):
    with pytest.raises(GraphError):
        Tensor(spec)


def test_it_cannot_be_left_out():
    class Maybe(BaseModel):
        x: Annotated[NDArray[Any], Tensor("float32[2]")] | None

    with pytest.raises(GraphError, match="cannot be Optional"):
        Graph("maybe", input=Maybe, output=Sum)


def test_the_schema_says_the_shape():
    x = Picture.model_json_schema()["properties"]["x"]
    assert (x["minItems"], x["items"]["maxItems"], x["items"]["items"]) == (
        2,
        2,
        {"type": "number"},
    )
    assert graph().plan.input_schema.fields["x"] == ColumnType("float32", (2, 2))
