"""The tabular benchmark's graph with its model from a registry, and the versions to swap."""

import os
import shutil
import warnings
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from twinpath import Graph, RegistryModel
from twinpath.graph.tensors import Tensor

NAME = "swapped"
WIDTH = 30
URI_VARIABLE = "BENCHMARK_REGISTRY"


class Request(BaseModel):
    """One row of numbers."""

    x: Annotated[NDArray[Any], Tensor(f"float32[{WIDTH}]")]


class Answer(BaseModel):
    """Its score."""

    score: float


graph = Graph(NAME, input=Request, output=Answer)
with graph as row:
    graph.output(
        RegistryModel(
            NAME,
            tracking_uri=os.environ.get(URI_VARIABLE, "sqlite:///not-set.db"),
            inputs={"x": f"float32[{WIDTH}]"},
        )(row)
    )
app = graph.app


def register(folder: Path, versions: int) -> str:
    """Register so many versions, of which the first serves; the registry's address."""
    import mlflow.sklearn
    import skops.io
    from mlflow import MlflowClient
    from mlflow.models import infer_signature
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, WIDTH)).astype(np.float32)
    y = x @ rng.normal(size=WIDTH) > 0
    uri = f"sqlite:///{folder}/mlflow.db"
    client = MlflowClient(uri, uri)
    client.create_registered_model(NAME)
    first = folder / "first"
    for number in range(versions):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01 * (number + 1)))
        model.fit(x, y)
        place = folder / f"version-{number + 1}"
        if number == 0:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                mlflow.sklearn.save_model(
                    model, first, signature=infer_signature(x, np.zeros(4)),
                    input_example=x[:8], pip_requirements=["mlflow"],
                )  # fmt: skip
        shutil.copytree(first, place)
        skops.io.dump(model, place / "model.skops")
        client.create_model_version(NAME, str(place))
    client.set_registered_model_alias(NAME, "champion", "1")
    return uri
