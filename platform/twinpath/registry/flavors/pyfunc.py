"""pyfunc: any Python code behind MLflow's own interface, of a trusted source. The slowest way: it
goes through a DataFrame, and MLflow checks the signature once more."""

from typing import Any

import numpy as np

from twinpath.errors import MissingExtraError
from twinpath.graph.columns import Columns
from twinpath.registry.flavors.model import LoadOptions
from twinpath.registry.manifest import Manifest
from twinpath.registry.signature import UNNAMED


class PyfuncModel:
    """A pyfunc model on a DataFrame, or on an array where its signature is a tensor."""

    vram_bytes = 0

    def __init__(self, model: Any, host_bytes: int) -> None:
        self._model, self.host_bytes = model, host_bytes

    def predict(self, inputs: Columns) -> Any:
        """See `Model`."""
        import pandas as pd

        given = inputs[UNNAMED] if UNNAMED in inputs else pd.DataFrame(inputs, copy=False)
        found = self._model.predict(given)
        if isinstance(found, pd.DataFrame):
            return {str(name): found[name].to_numpy() for name in found.columns}
        if isinstance(found, dict):
            return {str(name): np.asarray(values) for name, values in found.items()}
        return np.asarray(found)


def load(manifest: Manifest, options: LoadOptions) -> PyfuncModel:
    """The pyfunc of a version. Raises MissingExtraError and whatever its code raises."""
    try:
        from mlflow import pyfunc
    except ImportError:
        raise MissingExtraError("mlflow", "registry") from None
    size = sum(path.stat().st_size for path in manifest.folder.rglob("*") if path.is_file())
    return PyfuncModel(pyfunc.load_model(str(manifest.folder)), size)
