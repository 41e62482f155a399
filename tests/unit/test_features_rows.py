"""From views' values to a node's columns."""

from types import SimpleNamespace

import numpy as np
import pytest

from twinpath.errors import ConfigError, NodeContractError
from twinpath.features.online import ViewRows
from twinpath.features.rows import RowMaker
from twinpath.features.spec import OnDemandSpec, ServiceSpec, ViewSpec
from twinpath.graph.columns import ROW_ERROR

KINDS = {"f": "float32", "i": "int64", "b": "bool", "t": "str", "m": "datetime64[us]"}
VIEW = ViewSpec("v", ("k",), KINDS, None, "at")
SPEC = ServiceSpec("s", (VIEW,), promised=tuple(("v", name) for name in KINDS))
GIVEN = {"k": np.array(["x", "y"], dtype=object)}


def rows(found=(True, False), **values) -> ViewRows:
    columns = {
        "f": np.array([1, 2], np.float32),
        "i": np.array([2**60 + 1, 2]),
        "b": np.array([True, True]),
        "t": np.array(["one", "two"], dtype=object),
        "m": np.array(["2020-01-01", "2020-01-02"], dtype="datetime64[us]"),
    }
    n = len(found)
    return ViewRows(
        VIEW, columns | values, np.array(found, dtype=bool), np.zeros(n, dtype=np.int64)
    )


def test_nothing_stands_where_nothing_held():
    made = RowMaker(SPEC).columns([rows()], GIVEN, 2)
    assert made["i"].tolist() == [2**60 + 1, 0]
    assert np.isnan(made["f"][1])
    assert made["b"].tolist() == [True, False]
    assert made["t"].tolist() == ["one", None]
    assert np.isnat(made["m"][1])
    assert {name: values.dtype.name for name, values in made.items()}["f"] == "float32"


def test_defaults_stand_where_nothing_held_and_where_the_view_has_null():
    maker = RowMaker(SPEC, defaults={"f": -1.0, "i": -7, "t": "none"})
    given = rows((True, False), f=np.array([np.nan, 5.0], np.float32))
    made = maker.columns([given], GIVEN, 2)
    assert made["f"].tolist() == [-1.0, -1.0]
    assert made["i"].tolist() == [2**60 + 1, -7]
    assert made["t"].tolist() == ["one", "none"]


def test_a_list_is_the_default_of_each_row_that_has_nothing():
    kinds = {"e": "any"}
    view = ViewSpec("v", ("k",), kinds, None, "at")
    spec = ServiceSpec("s", (view,), promised=(("v", "e"),))
    maker = RowMaker(spec, defaults={"e": [0.0, 0.5]})
    for n in (1, 2, 3):
        made = maker.nothing({"k": np.array(["x"] * n, dtype=object)}, n)
        assert made["e"].tolist() == [[0.0, 0.5]] * n


@pytest.mark.parametrize(
    ("name", "default", "kind"),
    [("i", "x", "int64"), ("i", 0.5, "int64"), ("f", [1.0, 2.0], "float32"), ("b", None, "bool")],
)
def test_a_default_that_its_column_cannot_hold_is_refused(name, default, kind):
    with pytest.raises(ConfigError, match=f"default of '{name}'.*expected a value of {kind}"):
        RowMaker(SPEC, defaults={name: default})


def test_defaults_of_every_type_are_held():
    moment = np.datetime64("2020-01-01T00:00:00", "us")
    defaults = {"f": 1, "i": True, "b": False, "t": "none", "m": moment.item()}
    made = RowMaker(SPEC, defaults=defaults).nothing(GIVEN, 2)
    assert {name: values.tolist()[1] for name, values in made.items()} == {
        "f": 1.0, "i": 1, "b": False, "t": "none", "m": moment.item(),
    }  # fmt: skip


def test_null_gives_integers_and_truth_values_as_floats():
    maker = RowMaker(SPEC, "null")
    made = maker.columns([rows()], GIVEN, 2)
    assert maker.outputs["i"] == maker.outputs["b"] == "float64"
    assert np.isnan(made["i"][1])
    assert made["b"][0] == 1.0
    assert np.isnan(made["b"][1])


def test_a_join_may_give_integers_with_nulls_as_floats_or_objects():
    for column in (np.array([3.0, np.nan]), np.array([3, None], dtype=object)):
        made = RowMaker(SPEC, "null").columns([rows((True, True), i=column)], GIVEN, 2)
        assert made["i"][0] == 3
        assert np.isnan(made["i"][1])


def test_error_fails_rows_that_nothing_is_known_of_and_not_those_with_a_null():
    given = rows((True, False), f=np.array([np.nan, np.nan], np.float32))
    made = RowMaker(SPEC, "error").columns([given], GIVEN, 2)
    assert made[ROW_ERROR][0] is None
    assert made[ROW_ERROR][1] == "view 'v' has no features that hold for k='y'"
    assert ROW_ERROR not in RowMaker(SPEC, "error").nothing(GIVEN, 2)


def on_demand(function, mode="python", kind="float64") -> ServiceSpec:
    transformation = SimpleNamespace(transform=function)
    computed = OnDemandSpec(
        "d", {"y": kind}, (("v", "f"), ("v", "i")), {"z": "float64"}, mode,
        SimpleNamespace(feature_transformation=transformation),
    )  # fmt: skip
    return ServiceSpec("s", (VIEW,), (computed,), (("v", "f"), ("d", "y")))


def test_a_view_on_demand_sees_features_under_both_names_and_the_request():
    def double(inputs):
        assert inputs["f"] is inputs["v__f"]
        assert inputs["i"] == [2**60 + 1, None]
        return {"y": [f + z for f, z in zip(inputs["f"], inputs["z"], strict=True)]}

    given = GIVEN | {"z": np.array([0.5, 0.5])}
    made = RowMaker(on_demand(double)).columns([rows()], given, 2)
    assert made["y"][0] == 1.5
    assert np.isnan(made["y"][1])


def test_a_view_on_demand_in_pandas_gives_the_same():
    given = GIVEN | {"z": np.array([0.5, 0.5])}
    spec = on_demand(lambda frame: frame.assign(y=frame["f"] + frame["z"])[["y"]], "pandas")
    made = RowMaker(spec).columns([rows()], given, 2)
    assert made["y"][0] == 1.5
    assert np.isnan(made["y"][1])


def test_a_view_on_demand_that_loses_rows_is_named():
    spec = on_demand(lambda inputs: {"y": [1.0]})
    with pytest.raises(NodeContractError, match="'d', feature 'y': expected 2 values, got 1"):
        RowMaker(spec).columns([rows()], GIVEN | {"z": np.zeros(2)}, 2)


def test_two_views_with_the_same_feature_need_full_names():
    other = ViewSpec("w", ("k",), {"f": "float32"}, None, "at")
    spec = ServiceSpec("s", (VIEW, other), promised=(("v", "f"), ("w", "f")))
    with pytest.raises(ConfigError, match="full_names=True"):
        RowMaker(spec)
    assert list(RowMaker(spec, full_names=True).outputs) == ["v__f", "w__f"]


def test_rows_of_an_empty_batch_have_all_columns():
    empty = rows((), **{n: v[:0] for n, v in rows().values.items()})
    made = RowMaker(SPEC, "error").columns([empty], {"k": GIVEN["k"][:0]}, 0)
    assert set(made) == set(KINDS)
