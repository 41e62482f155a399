"""Columns, outcomes and column types."""

import numpy as np
import pytest

from twinpath.errors import GraphError
from twinpath.graph.columns import Outcome, RowError, concat, row_count, take
from twinpath.graph.dtypes import ColumnType, type_of


def test_row_count_of_no_columns_is_zero():
    assert row_count({}) == 0
    assert row_count({"x": np.zeros((3, 2))}) == 3


def test_take_and_concat_keep_order_and_shape():
    columns = {"x": np.arange(4), "t": np.arange(8).reshape(4, 2)}
    parts = [take(columns, np.array([2, 3])), take(columns, np.array([0]))]
    joined = concat(parts)
    assert joined["x"].tolist() == [2, 3, 0]
    assert joined["t"].tolist() == [[4, 5], [6, 7], [0, 1]]


def test_split_gives_each_request_its_rows_and_errors():
    error = RowError("row_failed", "no")
    outcome = Outcome(5, {"y": np.array([0, 2, 4])}, np.array([0, 2, 4]), {1: error, 3: error})
    first, empty, second = outcome.split([2, 0, 3])
    assert first.columns["y"].tolist() == [0]
    assert first.errors == {1: error}
    assert (empty.n, empty.ok) == (0, True)
    assert second.columns["y"].tolist() == [2, 4]
    assert (second.rows.tolist(), second.errors) == ([0, 2], {1: error})


@pytest.mark.parametrize(
    "text", ["float64", "str", "float32[30]", "float32[3,224,224]", "datetime64[us]", "any"]
)
def test_a_column_type_is_written_as_it_is_read(text):
    assert str(ColumnType.parse(text)) == text


@pytest.mark.parametrize("text", ["float", "flaot64", "float64[]", "float64[x]", "", 3])
def test_text_that_is_no_column_type_is_refused(text):
    with pytest.raises(GraphError, match="no column type"):
        ColumnType.parse(text)


def test_a_typo_in_a_column_type_is_hinted():
    with pytest.raises(GraphError, match="Did you mean 'float64'"):
        ColumnType.parse("flaot64")


def test_values_are_widened_but_never_narrowed():
    wide = ColumnType.parse("float64")
    assert wide.conform(np.zeros(2, np.float32)).dtype == np.float64
    assert ColumnType.parse("float32").conform(np.zeros(2)) is None
    assert ColumnType.parse("int64").conform(np.zeros(2)) is None
    assert ColumnType.parse("float32[3]").conform(np.zeros((2, 4), np.float32)) is None
    assert ColumnType.parse("str").conform(np.array(["a"])).dtype == object


def test_rows_that_nothing_filled_are_null_where_the_type_can_say_so():
    assert np.isnan(ColumnType.parse("float32[2]").filled(3)).all()
    assert ColumnType.parse("str").filled(2).tolist() == [None, None]
    assert np.isnat(ColumnType.parse("datetime64[us]").filled(1))[0]
    assert ColumnType.parse("int64").filled(2, 7).tolist() == [7, 7]
    assert ColumnType.parse("any").filled(2, [1, 2]).tolist() == [[1, 2], [1, 2]]


def test_an_array_tells_its_type():
    assert str(type_of(np.zeros((4, 3), np.float32))) == "float32[3]"
    assert str(type_of(np.array(["a"], object))) == "str"
