"""LightGBM: its own text files, read as a Booster; skops and pickles of its estimators."""

from typing import Any

import numpy as np

from twinpath.errors import MissingExtraError, ModelLoadError
from twinpath.graph.columns import Columns
from twinpath.registry.flavors import skops_files
from twinpath.registry.flavors.model import LoadOptions
from twinpath.registry.flavors.sklearn import unpickled
from twinpath.registry.manifest import Manifest
from twinpath.registry.signature import matrix


class BoosterModel:
    """A Booster on a float64 matrix; with ``classes``, an estimator's answer where no scores are
    wanted."""

    vram_bytes = 0

    def __init__(self, booster: Any, classes: Any, options: LoadOptions, host_bytes: int) -> None:
        self._booster, self.host_bytes = booster, host_bytes
        self._classes = None if options.scores else classes
        self._threads = options.threads

    def predict(self, inputs: Columns) -> Any:
        """See `Model`."""
        found = self._booster.predict(
            matrix(inputs, tuple(inputs), np.float64), num_threads=self._threads
        )
        if self._classes is None:
            return found
        picked = (found > 0.5).astype(np.int64) if found.ndim == 1 else found.argmax(axis=1)
        return np.asarray(self._classes)[picked]


def load(manifest: Manifest, options: LoadOptions) -> BoosterModel:
    """The booster of a version. Raises MissingExtraError, ModelLoadError."""
    try:
        import lightgbm
    except ImportError:
        raise MissingExtraError("lightgbm", "flavors") from None
    path = manifest.file(str(manifest.flavors["lightgbm"]["data"]))
    size = path.stat().st_size
    if path.suffix in (".lgb", ".txt"):
        try:
            return BoosterModel(lightgbm.Booster(model_file=str(path)), None, options, size)
        except lightgbm.basic.LightGBMError as error:
            raise ModelLoadError(f"{path.name} cannot be read: {str(error)[:300]}") from None
    estimator = skops_files.load(path) if path.suffix == ".skops" else unpickled(path)
    booster = getattr(estimator, "booster_", estimator)
    return BoosterModel(booster, getattr(estimator, "classes_", None), options, size)
