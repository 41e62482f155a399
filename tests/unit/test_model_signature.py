"""Columns and a model's signature: mapped, enforced, and the difference named."""

from typing import Any

import numpy as np
import pytest

from twinpath.errors import SignatureError
from twinpath.graph.dtypes import ColumnType
from twinpath.registry.manifest import ModelColumn, ModelSignature
from twinpath.registry.signature import Binding, matrix


def types(**specs: str) -> dict[str, ColumnType]:
    return {name: ColumnType.parse(spec) for name, spec in specs.items()}


def signature(**specs: str) -> ModelSignature:
    return ModelSignature(tuple(ModelColumn(n, ColumnType.parse(s)) for n, s in specs.items()))


def tensor(spec: str) -> ModelSignature:
    return ModelSignature((ModelColumn(None, ColumnType.parse(spec)),))


SCORE = types(score="float64")


def test_named_columns_go_in_the_models_order_and_types_whatever_the_nodes():
    binding = Binding(signature(b="float64", a="float64"), types(a="float32", b="int32"), SCORE)
    given = binding.given({"a": np.ones(2, np.float32), "b": np.zeros(2, np.int32)})
    assert list(given) == ["b", "a"]
    assert {values.dtype for values in given.values()} == {np.dtype(np.float64)}


def test_every_difference_is_named_at_once():
    wanted = signature(a="float64", colour="str", size="float32")
    with pytest.raises(SignatureError) as caught:
        Binding(wanted, types(a="str", color="str", size="float64"), SCORE)
    text = str(caught.value)
    assert "it reads 'a' as float64, which is given as str" in text
    assert "it reads 'colour' (str), which is not given. Did you mean 'color'?" in text
    assert "it reads 'size' as float32, which is given as float64" in text


def test_a_model_may_read_fewer_columns_than_there_are():
    binding = Binding(signature(a="float64"), types(a="float64", b="float64"), SCORE)
    assert binding.names == ("a",)


def test_optional_columns_may_be_absent():
    optional = ModelSignature((ModelColumn("a", ColumnType.parse("float64"), False),))
    assert Binding(optional, types(b="float64"), SCORE).names == ()


def test_columns_are_stacked_into_the_one_tensor_of_a_model():
    binding = Binding(tensor("float32[2]"), types(a="float32", b="float32"), SCORE)
    given = binding.given({"a": np.array([1, 2], np.float32), "b": np.array([3, 4], np.float32)})
    assert given[""].tolist() == [[1, 3], [2, 4]]
    whole = Binding(tensor("float32[2]"), types(x="float32[2]"), SCORE)
    assert whole.given({"x": np.ones((3, 2), np.float32)})[""].shape == (3, 2)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (types(a="float32"), "one tensor of float32[2] a row and the node gives 1"),
        (types(a="float32", b="float64"), "'b' is float64"),
        (types(x="float32[3]"), "x' (float32[3])"),
    ],
)
def test_what_does_not_go_into_the_tensor_is_named(given: Any, text: str):
    with pytest.raises(SignatureError) as caught:
        Binding(tensor("float32[2]"), given, SCORE)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (np.array([1, 2]), [1.0, 2.0]),
        (np.array([[1.0], [2.0]]), [1.0, 2.0]),
        (np.array([[0.9, 0.1], [0.2, 0.8]]), [0.1, 0.8]),
        ({"anything": np.array([1.0, 2.0], np.float32)}, [1.0, 2.0]),
        ({"other": np.zeros(2), "score": np.array([3.0, 4.0])}, [3.0, 4.0]),
    ],
)
def test_an_answer_becomes_the_nodes_column(raw: Any, expected: list[float]):
    answer = Binding(ModelSignature(), types(a="float64"), SCORE).answer(raw, 2)
    assert answer["score"].tolist() == expected
    assert answer["score"].dtype == np.float64


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (np.zeros(3), "expected 2 rows"),
        (np.float64(1), "expected 2 rows"),
        (np.zeros((2, 3)), "expected float64, got float64[3]"),
        (np.array(["a", "b"], object), "expected float64, got str"),
        ({"a": np.zeros(2), "b": np.zeros(2)}, "returns 'a', 'b' and not 'score'"),
    ],
)
def test_an_answer_that_is_not_the_nodes_column_is_an_error_that_says_so(raw: Any, text: str):
    with pytest.raises(SignatureError) as caught:
        Binding(ModelSignature(), types(a="float64"), SCORE).answer(raw, 2)
    assert text in str(caught.value)


def test_a_column_that_is_gone_at_run_time_is_named():
    binding = Binding(signature(a="float64"), types(a="float64"), SCORE)
    with pytest.raises(SignatureError, match="reads column 'a'"):
        binding.given({"aa": np.zeros(1)})


def test_a_matrix_has_scalars_and_tensors_side_by_side():
    block = matrix({"a": np.array([1, 2]), "t": np.array([[3.0, 4.0], [5.0, 6.0]])}, ("a", "t"))
    assert block.tolist() == [[1, 3, 4], [2, 5, 6]]
