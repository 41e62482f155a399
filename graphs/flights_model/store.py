"""The feature repository of the flights example: made beside its data, and materialised.

``<directory>/feature_repo`` is an ordinary Feast repository; ``TWINPATH_FLIGHTS_REDIS`` (host:port)
makes its online store Redis instead of SQLite.
"""

import os
import shutil
from datetime import UTC, datetime
from pathlib import Path

from graphs.flights_model.data import whole_directory
from graphs.flights_model.features import LOOKED_UP, SERVICE, TREND, VIEWS
from twinpath import FeatureLookup

DEFINITIONS = Path(__file__).resolve().parent.parent / "flights_features"
REDIS_VARIABLE = "TWINPATH_FLIGHTS_REDIS"

#: Up to here the online store is filled: noon in New York on the Monday before Christmas.
MOMENT = datetime(2013, 12, 23, 17, tzinfo=UTC)

#: What the service needs and gives. Written here, so that importing a graph needs no Feast.
KEYS = dict.fromkeys((view.key for view in VIEWS), "str")
FEATURES = dict.fromkeys(LOOKED_UP, "float32") | {TREND: "float64"}


def repository(directory: Path) -> Path:
    """The repository's folder."""
    return directory / "feature_repo"


def lookup(directory: Path) -> FeatureLookup:
    """The node that gives the service's features, NaN where nothing was known."""
    return FeatureLookup(
        SERVICE, str(repository(directory)), as_of="as_of", keys=KEYS, features=FEATURES
    )


def make_repository(directory: Path) -> Path:
    """Make the repository and apply its definitions, unless it is there; return its folder."""
    from twinpath.features.definitions import apply, read_definitions
    from twinpath.features.repo import FeatureRepo

    folder = repository(directory)
    if folder.is_dir():
        return folder
    store = "feature_store.redis.yaml" if os.environ.get(REDIS_VARIABLE) else "feature_store.yaml"
    with whole_directory(folder) as out:
        shutil.copy(DEFINITIONS / "definitions.py", out)
        shutil.copy(DEFINITIONS / store, out / "feature_store.yaml")
        apply(FeatureRepo(out), read_definitions(out))
    return folder


def materialise(directory: Path, until: datetime = MOMENT) -> None:
    """Write the features that held at `until` to the online store."""
    from twinpath.features.materialise import materialise as write
    from twinpath.features.repo import FeatureRepo

    write(FeatureRepo(repository(directory)), end=until)
