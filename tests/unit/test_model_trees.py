"""Trees out of files are walked by code that looks at no bounds: they are checked before."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("skops")

import skops.io
from sklearn.ensemble import (
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    RandomForestClassifier,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from twinpath.errors import UntrustedModelError
from twinpath.registry.flavors import skops_files, trees

RNG = np.random.default_rng(0)
X = RNG.normal(size=(300, 3))
Y = X[:, 0] + X[:, 1] > 0


def forest() -> Any:
    return RandomForestClassifier(3, max_depth=3, random_state=0).fit(X, Y)


@pytest.mark.parametrize(
    "model",
    [
        forest(),
        GradientBoostingClassifier(n_estimators=3).fit(X, Y),
        HistGradientBoostingClassifier(max_iter=3).fit(X, Y),
        make_pipeline(StandardScaler(), HistGradientBoostingClassifier(max_iter=3)).fit(X, Y),
    ],
    ids=lambda model: type(model).__name__,
)
def test_models_with_trees_are_read_from_skops_and_answer_the_same(model: Any, tmp_path: Path):
    path = tmp_path / "model.skops"
    skops.io.dump(model, path)
    found = skops_files.load(path)
    np.testing.assert_array_equal(found.predict_proba(X), model.predict_proba(X))


def _bent(field: str, value: int) -> Any:
    model = forest()
    tree = model.estimators_[1].tree_
    state = tree.__getstate__()
    nodes = state["nodes"].copy()
    nodes[field][0] = value
    tree.__setstate__(state | {"nodes": nodes})
    return model


@pytest.mark.parametrize(
    ("field", "value"),
    [("left_child", 10_000), ("right_child", -7), ("left_child", 0), ("feature", 3)],
)
def test_a_tree_that_leads_out_of_itself_or_in_a_circle_is_refused(field: str, value: int):
    with pytest.raises(UntrustedModelError, match="lead out"):
        trees.check(_bent(field, value))


@pytest.mark.parametrize(("field", "value"), [("left", 10_000), ("right", 0), ("feature_idx", 9)])
def test_so_is_one_of_histogram_gradient_boosting(field: str, value: int):
    model = HistGradientBoostingClassifier(max_iter=3).fit(X, Y)
    predictor = model._predictors[1][0]
    nodes = predictor.nodes.copy()
    nodes[field][0] = value
    predictor.nodes = nodes
    with pytest.raises(UntrustedModelError, match="lead out"):
        trees.check(model)


def test_a_type_that_is_not_on_our_list_is_named(tmp_path: Path):
    from sklearn.preprocessing import FunctionTransformer

    path = tmp_path / "model.skops"
    skops.io.dump(FunctionTransformer(np.savetxt).fit(X), path)
    with pytest.raises(UntrustedModelError, match=r"numpy\.savetxt"):
        skops_files.load(path)
