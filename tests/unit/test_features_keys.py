"""Keys of a batch: distinct ones once, in Feast's bytes."""

import numpy as np
import pytest

from twinpath.errors import ConfigError
from twinpath.features.keys import KeyEncoder
from twinpath.features.spec import ViewSpec
from twinpath.features.store import group_views


def view(name="v", keys=("k",), kinds=None, stored=()) -> ViewSpec:
    return ViewSpec(
        name, keys, {"x": "float32"}, None, "at", key_types=kinds or {}, stored_keys=stored
    )


def texts(*values):
    return np.array(values, dtype=object)


def test_a_batch_has_each_key_once_and_every_row_knows_its_place():
    found = KeyEncoder(view()).distinct({"k": texts("b", "a", "b", None, "a")})
    assert found.place.tolist() == [0, 1, 0, -1, 1]
    assert len(found.keys) == 2


def test_a_batch_whose_rows_all_have_keys_of_their_own_needs_no_places():
    found = KeyEncoder(view()).distinct({"k": texts("b", "a")})
    assert found.place is None
    assert (len(found.keys), found.rows) == (2, 2)


def test_the_bytes_are_count_then_names_then_typed_values():
    (key,) = KeyEncoder(view(), b"project").distinct({"k": texts("ab")}).keys
    assert key == (
        b"\x01\0\0\0" b"\x02\0\0\0\x01\0\0\0k" b"\x02\0\0\0\x02\0\0\0ab" b"project"
    )  # fmt: skip


def test_keys_of_several_columns_are_ordered_by_the_name_in_the_store():
    both = view(keys=("user", "shop"), kinds={"shop": "int64"}, stored=("a", "b"))
    swapped = view(keys=("shop", "user"), kinds={"shop": "int64"}, stored=("b", "a"))
    given = {"user": texts("u"), "shop": np.array([-1])}
    assert KeyEncoder(both).distinct(given).keys == KeyEncoder(swapped).distinct(given).keys
    assert KeyEncoder(both).distinct(given).keys[0].endswith(b"\x04\0\0\0\x08\0\0\0" + b"\xff" * 8)


def test_a_null_in_any_key_column_is_no_key():
    both = view(keys=("user", "shop"), kinds={"shop": "int64"})
    found = KeyEncoder(both).distinct({"user": texts(None, "u"), "shop": np.array([1, 1])})
    assert found.place.tolist() == [-1, 0]


def test_a_key_of_a_type_that_cannot_be_stored_is_refused():
    with pytest.raises(ConfigError, match="float64"):
        KeyEncoder(view(kinds={"k": "float64"}))


def test_views_of_the_same_entities_share_their_keys():
    groups = group_views([view("a"), view("b", ("l",)), view("c")])
    assert [[v.name for v in group] for group in groups] == [["a", "c"], ["b"]]


def test_a_view_without_an_entity_is_refused_at_once():
    with pytest.raises(ConfigError, match="view 'all' has no entity"):
        KeyEncoder(ViewSpec("all", (), {"x": "float64"}, None, "at"))
