"""MLflow: ``python -m benchmarks.online.servers.mlflow_model MODEL FOLDER`` writes what
``mlflow models serve`` reads."""

import sys

import mlflow
import numpy as np
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec

from benchmarks.online.models import ANSWER_WIDTH, WIDTH, load


class Model(mlflow.pyfunc.PythonModel):
    """One tensor in, one out. MLflow has no batching across requests."""

    def __init__(self, name):
        self.name = name

    def load_context(self, context):
        """Once for each worker."""
        self._predict = load(self.name)

    def predict(self, context, model_input, params=None):
        """One request."""
        return self._predict(np.asarray(model_input, dtype=np.float32))


if __name__ == "__main__":
    # By its own name, so that loading it imports this module.
    from benchmarks.online.servers.mlflow_model import Model as Importable

    name = sys.argv[1]

    def spec(width):
        """Any number of rows."""
        return Schema([TensorSpec(np.dtype(np.float32), (-1, width))])

    mlflow.pyfunc.save_model(
        sys.argv[2],
        python_model=Importable(name),
        signature=ModelSignature(spec(WIDTH[name]), spec(ANSWER_WIDTH[name])),
        pip_requirements=[],
    )
