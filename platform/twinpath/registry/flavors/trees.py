"""Bounds of scikit-learn's trees.

Their nodes refer to each other, and to features, by position, and the compiled code that walks them
looks at no bounds: a file with other positions would read beyond the arrays, or never end. So these
are checked once, before the first row.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from twinpath.errors import UntrustedModelError

_SKIPPED = (str, bytes, int, float, bool, complex, type(None), type, np.generic)


def check(model: Any) -> None:
    """Raises UntrustedModelError for a model with a tree whose positions lead out of it."""
    for part in _parts(model):
        kind = f"{type(part).__module__}.{type(part).__name__}"
        if kind == "sklearn.tree._tree.Tree":
            _check_tree(part)
        elif kind.endswith("_hist_gradient_boosting.predictor.TreePredictor"):
            _check_predictor(part, getattr(model, "n_features_in_", None))


def _check_tree(tree: Any) -> None:
    left, right = np.asarray(tree.children_left), np.asarray(tree.children_right)
    feature = np.asarray(tree.feature)
    inner = left != -1
    n = len(left)
    here = np.flatnonzero(inner)
    good = n > 0 and bool((right[~inner] == -1).all())
    for children in (left[inner], right[inner]):
        # A child comes after its parent, so a walk ends.
        good = good and bool(((children > here) & (children < n)).all())
    good = good and bool(((feature[inner] >= 0) & (feature[inner] < tree.n_features)).all())
    if not good:
        raise UntrustedModelError(_TEXT)


def _check_predictor(predictor: Any, features: int | None) -> None:
    nodes = np.asarray(predictor.nodes)
    n = len(nodes)
    inner = nodes["is_leaf"] == 0
    here = np.flatnonzero(inner)
    good = n > 0
    for name in ("left", "right"):
        children = nodes[name][inner].astype(np.int64)
        good = good and bool(((children > here) & (children < n)).all())
    wanted = nodes["feature_idx"][inner]
    good = good and bool((wanted >= 0).all())
    if features is not None:
        good = good and bool((wanted < features).all())
    sets = nodes["bitset_idx"][inner & (nodes["is_categorical"] != 0)]
    good = good and bool((sets < len(predictor.raw_left_cat_bitsets)).all())
    if not good:
        raise UntrustedModelError(_TEXT)


_TEXT = "the nodes of a tree lead out of it: the file was not written by scikit-learn, or damaged"


def _parts(model: Any) -> Iterator[Any]:
    """Everything that a model is made of, once."""
    seen: set[int] = set()
    todo = [model]
    while todo:
        part = todo.pop()
        if isinstance(part, _SKIPPED) or id(part) in seen:
            continue
        seen.add(id(part))
        yield part
        if isinstance(part, dict):
            todo += part.values()
        elif isinstance(part, (list, tuple, set)):
            todo += part
        elif isinstance(part, np.ndarray):
            if part.dtype == object:
                todo += part.ravel().tolist()
        else:
            todo += getattr(part, "__dict__", {}).values()
