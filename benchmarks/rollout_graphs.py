"""A registered model that records what the guard compares, while a file is there."""

import os
import warnings
from pathlib import Path

import numpy as np
from pydantic import BaseModel, create_model

from twinpath import Columns, Graph
from twinpath.nodes.registry import RegistryModel

URI_VARIABLE = "BENCHMARK_REGISTRY"
#: Names the file.
SWITCH_VARIABLE = "BENCHMARK_RECORDS"
MODEL = "tabular"
WIDTH = 30
NUMBERS = tuple(f"f{i}" for i in range(WIDTH))
CARRIERS = tuple(f"C{i:02d}" for i in range(16))


class Answer(BaseModel):
    """What the graph answers."""

    score: float


Request = create_model(
    "Request", **(dict.fromkeys(NUMBERS, (float, ...)) | {"carrier": (str, ...)})
)  # type: ignore[call-overload]


def register(folder: Path) -> str:
    """Train and register the model in a registry of its own; the registry's address."""
    import mlflow.sklearn
    from mlflow import MlflowClient
    from mlflow.models import infer_signature
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    random = np.random.default_rng(0)
    rows = random.normal(size=(4000, WIDTH))
    late = rows @ random.normal(size=WIDTH) + random.normal(size=4000) > 0
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(rows, late)
    import pandas as pd

    frame = pd.DataFrame(rows[:8], columns=list(NUMBERS))
    uri = f"sqlite:///{folder}/mlflow.db"
    client = MlflowClient(uri, uri)
    client.create_registered_model(MODEL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mlflow.sklearn.save_model(
            model, folder / "model", signature=infer_signature(frame, np.zeros(8)),
            input_example=frame, pip_requirements=["mlflow"],
        )  # fmt: skip
    made = client.create_model_version(MODEL, str(folder / "model"))
    client.set_registered_model_alias(MODEL, "champion", made.version)
    return uri


def bodies(count: int = 100) -> list[bytes]:
    """Requests of one row."""
    import orjson

    random = np.random.default_rng(1)
    return [
        orjson.dumps(
            {"rows": [dict(zip(NUMBERS, row, strict=True)) | {"carrier": CARRIERS[i % 16]}]}
        )
        for i, row in enumerate(random.normal(size=(count, WIDTH)).round(4).tolist())
    ]


class Switched(RegistryModel):
    """Records in some batches and not in others: processes of the same code differ by more than
    the recording costs."""

    def setup(self) -> None:
        """Load the model."""
        super().setup()
        self._switch = os.environ.get(SWITCH_VARIABLE, "")
        self._records = self._router._recorder

    def predict(self, columns: Columns) -> Columns:
        """As the model does."""
        self._router._recorder = self._records if os.path.exists(self._switch) else None
        return super().predict(columns)


graph = Graph("rollout_cost", input=Request, output=Answer)
with graph as rows:
    model = Switched(
        MODEL,
        tracking_uri=os.environ.get(URI_VARIABLE, "sqlite:///mlflow.db"),
        inputs=dict.fromkeys(NUMBERS, "float64"),
        segments=("carrier",),
    )
    graph.output(model(rows))
app = graph.app
