"""scikit-learn: skops files, and pickles whose source is trusted."""

from typing import Any

import numpy as np

from twinpath.errors import MissingExtraError, ModelLoadError
from twinpath.graph.columns import Columns
from twinpath.registry.flavors import skops_files
from twinpath.registry.flavors.model import LoadOptions
from twinpath.registry.manifest import Manifest
from twinpath.registry.signature import matrix
from twinpath.registry.threads import one_thread


class SklearnModel:
    """An estimator on a matrix of its inputs; on a DataFrame if it was fitted on text columns."""

    vram_bytes = 0

    def __init__(self, estimator: Any, options: LoadOptions, host_bytes: int) -> None:
        self.estimator, self.host_bytes = estimator, host_bytes
        scores = options.scores and hasattr(estimator, "predict_proba")
        self._method = estimator.predict_proba if scores else getattr(estimator, "predict", None)
        if self._method is None:
            raise ModelLoadError(
                f"{type(estimator).__name__} has neither predict_proba nor predict"
            )
        self._limit = one_thread(options.threads)
        names = getattr(estimator, "feature_names_in_", None)
        #: Only text needs names; a matrix is quicker, and warns of nothing once these are gone.
        if names is not None and hasattr(estimator, "feature_names_in_"):
            _forget_names(estimator)

    def predict(self, inputs: Columns) -> Any:
        """See `Model`."""
        with self._limit():
            if any(values.dtype.kind == "O" for values in inputs.values()):
                return self._method(_frame(inputs))  # type: ignore[misc]  # checked above
            return self._method(matrix(inputs, tuple(inputs)))  # type: ignore[misc]  # as above


def load(manifest: Manifest, options: LoadOptions) -> SklearnModel:
    """The estimator of a version. Raises MissingExtraError, ModelLoadError."""
    flavor = manifest.flavors["sklearn"]
    path = manifest.file(str(flavor["pickled_model"]))
    if flavor.get("serialization_format") == "skops":
        estimator = skops_files.load(path)
    else:
        estimator = unpickled(path)
    return SklearnModel(estimator, options, path.stat().st_size)


def unpickled(path: Any) -> Any:
    """What a pickle holds: only for files that are trusted."""
    try:
        import joblib  # type: ignore[import-untyped]
    except ImportError:
        raise MissingExtraError("scikit-learn", "registry") from None
    return joblib.load(path)  # reads plain pickles too


def _frame(inputs: Columns) -> Any:
    import pandas as pd

    return pd.DataFrame(inputs, copy=False)


def _forget_names(estimator: Any) -> None:
    """Take the fitted column names away where no step needs them, so that a matrix is taken without
    a warning for every call."""
    steps = [step for _, step in getattr(estimator, "steps", [])] or [estimator]
    needs_names = any(type(step).__name__ == "ColumnTransformer" for step in steps)
    if needs_names:
        return
    for each in (estimator, *steps):
        for holder in (each, getattr(each, "estimator", None)):
            if holder is not None and "feature_names_in_" in getattr(holder, "__dict__", {}):
                del holder.feature_names_in_


def as_floats(values: Any) -> Any:
    """An array of floats, whatever numeric type it has."""
    return np.asarray(values, dtype=np.float64)
