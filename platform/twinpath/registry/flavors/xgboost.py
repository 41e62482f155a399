"""XGBoost: its own JSON and UBJSON files, read as a Booster; no class that a file names is made."""

from typing import Any

import numpy as np

from twinpath.errors import MissingExtraError, ModelLoadError
from twinpath.graph.columns import Columns
from twinpath.registry.flavors.model import LoadOptions
from twinpath.registry.flavors.sklearn import SklearnModel, unpickled
from twinpath.registry.manifest import Manifest
from twinpath.registry.signature import matrix


class BoosterModel:
    """A Booster on a float32 matrix. Classes, where these are wanted, are the likeliest ones."""

    vram_bytes = 0

    def __init__(self, booster: Any, options: LoadOptions, classes: bool, host_bytes: int) -> None:
        self._booster, self.host_bytes = booster, host_bytes
        self._as_classes = classes and not options.scores
        booster.set_param({"nthread": options.threads})

    def predict(self, inputs: Columns) -> Any:
        """See `Model`."""
        found = self._booster.inplace_predict(
            matrix(inputs, tuple(inputs), np.float32), validate_features=False
        )
        if not self._as_classes:
            return found
        return (found > 0.5).astype(np.int64) if found.ndim == 1 else found.argmax(axis=1)


def load(manifest: Manifest, options: LoadOptions) -> Any:
    """The booster of a version. Raises MissingExtraError, ModelLoadError."""
    try:
        import xgboost
    except ImportError:
        raise MissingExtraError("xgboost", "flavors") from None
    flavor = manifest.flavors["xgboost"]
    path = manifest.file(str(flavor["data"]))
    if path.suffix not in (".json", ".ubj", ".xgb"):
        return SklearnModel(unpickled(path), options, path.stat().st_size)
    booster = xgboost.Booster()
    try:
        booster.load_model(path)
    except xgboost.core.XGBoostError as error:
        raise ModelLoadError(f"{path.name} cannot be read: {str(error)[:300]}") from None
    classes = "Classifier" in str(flavor.get("model_class", ""))
    return BoosterModel(booster, options, classes, path.stat().st_size)
