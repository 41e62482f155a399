"""The models that every server serves, trained once into a folder; the same code loads them.

Every server's environment imports this module: it needs numpy, joblib, scikit-learn and torch,
and nothing of the project.
"""

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Predict = Callable[[Array], Array]

#: Where a server finds the trained models.
FOLDER_VARIABLE = "BENCHMARK_MODELS"
#: Rows that a batch may have, for servers that count rows.
MAX_BATCH = 1024
#: Model → how many numbers a row has. The input is ``x`` and the output ``y``, both float32.
WIDTH = {"tabular": 30, "torch": 64, "echo": 8}
#: Model → how many numbers a row's answer has.
ANSWER_WIDTH = {"tabular": 1, "torch": 10, "echo": 8}
_HIDDEN = 1024


def folder() -> Path:
    """Where the models are. Raises KeyError when the variable is not set."""
    return Path(os.environ[FOLDER_VARIABLE])


def load(name: str) -> Predict:
    """A function from float32 ``(n, width)`` to float32 ``(n, answer width)``."""
    return {"tabular": _load_tabular, "torch": _load_torch, "echo": _load_echo}[name]()


def _load_echo() -> Predict:
    return _same


def _same(x: Array) -> Array:
    return x


def _load_tabular() -> Predict:
    import joblib

    # Partial, since KServe pickles its models.
    return partial(_probability, joblib.load(folder() / "tabular.joblib"))


def _probability(model: Any, x: Array) -> Array:
    return model.predict_proba(x)[:, 1:].astype(np.float32)


def _load_torch() -> Predict:
    import torch

    model = _network()
    model.load_state_dict(torch.load(folder() / "torch.pt", weights_only=True))
    return partial(_multiply, model.eval())


def _multiply(model: Any, x: Array) -> Array:
    import torch

    with torch.inference_mode():
        return model(torch.from_numpy(np.ascontiguousarray(x))).numpy()


def _network() -> Any:
    """About a million weights: a batch costs little more than a row."""
    from torch import nn

    return nn.Sequential(
        nn.Linear(WIDTH["torch"], _HIDDEN),
        nn.ReLU(),
        nn.Linear(_HIDDEN, _HIDDEN),
        nn.ReLU(),
        nn.Linear(_HIDDEN, ANSWER_WIDTH["torch"]),
        nn.Softmax(dim=1),
    )


def rows(name: str, count: int) -> Array:
    """Rows to ask with, as float64 that print short: patients, or noise of a fixed seed."""
    if name == "tabular":
        from sklearn.datasets import load_breast_cancer

        data = load_breast_cancer().data
        return data[np.arange(count) % len(data)]
    return np.random.default_rng(7).normal(size=(count, WIDTH[name])).round(4)


def train(into: Path) -> None:
    """Write ``tabular.joblib`` and ``torch.pt``, unless they are there."""
    import joblib
    import torch
    from sklearn.datasets import load_breast_cancer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    into.mkdir(parents=True, exist_ok=True)
    if not (into / "tabular.joblib").exists():
        data = load_breast_cancer()
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        joblib.dump(model.fit(data.data, data.target), into / "tabular.joblib")
    if not (into / "torch.pt").exists():
        # Random weights of a fixed seed: what is measured is how fast they are multiplied.
        torch.manual_seed(7)
        torch.save(_network().state_dict(), into / "torch.pt")


if __name__ == "__main__":
    train(Path(sys.argv[1]))
