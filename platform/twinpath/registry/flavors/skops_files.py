"""skops files, with our own list of what they may build. The list beside an artifact was written by
whoever wrote the artifact, so it is not looked at."""

import importlib
import sys
from pathlib import Path
from typing import Any

from twinpath.errors import MissingExtraError, ModelLoadError, UntrustedModelError
from twinpath.registry.flavors import trees

#: Beyond what skops itself takes for safe (scikit-learn's estimators, numpy, plain containers):
#: classes that fitted models hold, none of which runs what it is given. Trees are checked after.
ALLOWED = frozenset((
    "collections.OrderedDict",
    "collections.defaultdict",
    "lightgbm.basic.Booster",
    "lightgbm.sklearn.LGBMClassifier",
    "lightgbm.sklearn.LGBMRegressor",
    "lightgbm.sklearn.LGBMRanker",
    "numpy.clip",
    "numpy.exp",
    "numpy.log",
    "numpy.log1p",
    "numpy.expm1",
    "numpy.sqrt",
    "sklearn._loss.link.LogitLink",
    "sklearn._loss.loss.HalfBinomialLoss",
    "sklearn._loss.loss.HalfMultinomialLoss",
    "sklearn._loss.loss.HalfSquaredError",
    "sklearn.ensemble._hist_gradient_boosting.binning._BinMapper",
    "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor",
    "sklearn.neural_network._stochastic_optimizers.AdamOptimizer",
    "sklearn.neural_network._stochastic_optimizers.SGDOptimizer",
    "sklearn.tree._tree.Tree",
))  # fmt: skip


#: To know all estimators, skops imports every package of scikit-learn. This one imports torch,
#: which is more than a second and 180 MB of a replica that may not need it.
_OF_TORCH = "sklearn.externals.array_api_compat.torch"


def load(path: Path) -> Any:
    """The object in a skops file. Raises UntrustedModelError that names the types which are not
    allowed, ModelLoadError for a file that is damaged."""
    skops = _skops_io()
    try:
        unknown = set(skops.get_untrusted_types(file=path))
    except Exception as error:
        raise ModelLoadError(f"{path.name} is no skops file: {error}") from None
    refused = sorted(unknown - ALLOWED)
    if refused:
        raise UntrustedModelError(
            f"{path.name} would build {', '.join(refused[:5])}, which is not on the list of "
            "harmless types: save the model without it, or as a trusted pickle"
        )
    model = skops.load(path, trusted=sorted(unknown))
    trees.check(model)
    return model


def _skops_io() -> Any:
    """The package ``skops.io``. Raises MissingExtraError."""
    unknown = not {_OF_TORCH, "torch", "skops.io"} & set(sys.modules)
    if unknown:
        # Its import fails now, and what walks through scikit-learn passes over what does.
        sys.modules[_OF_TORCH] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("skops.io")
    except ImportError as error:
        if error.name not in ("skops", "skops.io"):
            raise
        raise MissingExtraError("skops", "registry") from None
    finally:
        if unknown:
            sys.modules.pop(_OF_TORCH, None)
