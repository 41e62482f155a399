"""The model's nodes: the delay model, and a second opinion on close calls."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import joblib  # type: ignore[import-untyped]
import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

from graphs.flights_model.features import LOOKED_UP, TREND
from graphs.flights_model.preprocess import STATIC
from graphs.flights_model.schema import flights_dir
from twinpath import Node
from twinpath.errors import ConfigError
from twinpath.graph.columns import Columns

#: The columns of the models' input matrix, in order, and their types.
FEATURES = (*STATIC, *LOOKED_UP)
FEATURE_TYPES = dict.fromkeys(FEATURES, "float32") | {TREND: "float64"}

#: Between these a first opinion counts as a close call and gets a second one.
CLOSE_CALL = (0.4, 0.6)


class DelayModel(Node):
    """Probability of an arrival over 15 minutes late, by gradient-boosted trees.

    Predicts on one thread: replicas are what scales, and OpenMP threads that outnumber the free
    CPUs made a single row ten times slower.
    """

    inputs = FEATURE_TYPES
    outputs = {"p_delay": "float64"}

    def __init__(self, data_dir: str | None = None) -> None:
        """Take the example's directory; `flights_dir` names the default."""
        self.data_dir = data_dir

    def setup(self) -> None:
        """Load the trained model. Raises ConfigError where there is none that fits."""
        self._model = load_model(flights_dir(self.data_dir) / "model" / "delay.joblib")
        self._threads = ThreadpoolController()

    def predict(self, columns: Columns) -> Columns:
        """Return `p_delay`."""
        with self._threads.limit(limits=1, user_api="openmp"):
            return {"p_delay": self._model.predict_proba(matrix(columns))[:, 1]}


class SecondOpinion(Node):
    """Asks a model of another kind, a small neural net; meant for close calls only."""

    inputs = FEATURE_TYPES
    outputs = {"p_review": "float64", "reviewed": "bool"}

    def __init__(self, data_dir: str | None = None) -> None:
        """Take the example's directory; `flights_dir` names the default."""
        self.data_dir = data_dir

    def setup(self) -> None:
        """Load the trained model. Raises ConfigError where there is none that fits."""
        self._model = load_model(flights_dir(self.data_dir) / "model" / "second.joblib")

    def predict(self, columns: Columns) -> Columns:
        """Return its own probability as `p_review`, and `reviewed` true."""
        p_review = self._model.predict_proba(matrix(columns))[:, 1]
        return {"p_review": p_review, "reviewed": np.ones(len(p_review), dtype=bool)}


def matrix(columns: Columns, features: Sequence[str] = FEATURES) -> NDArray[np.float64]:
    """Return the columns named by `features` side by side, as (n, len(features)) float64."""
    x = np.empty((len(columns[features[0]]), len(features)))
    for i, feature in enumerate(features):
        x[:, i] = columns[feature]
    return x


def save_model(path: Path, model: Any) -> None:
    """Write a fitted classifier with the names of the features that it was fitted on."""
    joblib.dump({"features": FEATURES, "model": model}, path)


def load_model(path: Path) -> Any:
    """Read what `save_model` wrote.

    Raises:
        ConfigError: there is no model, or it was fitted on other features.
    """
    if not path.is_file():
        raise ConfigError(f"no model at {path}: run python -m graphs.flights_model.train")
    saved = joblib.load(path)
    if saved["features"] != FEATURES:
        raise ConfigError(
            f"the model at {path} was fitted on other features: "
            "run python -m graphs.flights_model.train --again"
        )
    return saved["model"]
