"""Training-serving skew: rows that were read online, computed again offline as of their moments.

Each feature is compared row by row and as a distribution. The population stability index is over
deciles of the offline values, missing ones apart (below 0.1 is usually called stable, over 0.2 a
shift); Wasserstein's distance (SciPy) is in units of the offline values' standard deviation.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinpath.errors import ConfigError, MissingExtraError, did_you_mean
from twinpath.features.history import Sources, history_columns
from twinpath.features.repo import FeatureRepo
from twinpath.features.rows import RowMaker
from twinpath.graph.columns import ROW_ERROR, Columns

_BINS = 10
#: Keeps the logarithm of an empty bin finite.
_FEW = 1e-4


@dataclass(frozen=True, slots=True)
class FeatureSkew:
    """One feature. ``equal`` is the share of rows with the same value (missing equals missing);
    ``max_difference`` is over rows with a value on both sides, None for text; ``missing_online``
    and ``missing_offline`` are shares; ``wasserstein`` is None for text."""

    feature: str
    rows: int
    equal: float
    max_difference: float | None
    psi: float
    wasserstein: float | None
    missing_online: float
    missing_offline: float
    skewed: bool


@dataclass(frozen=True, slots=True)
class SkewReport:
    """All features of a service, and the bounds that were applied."""

    service: str
    rows: int
    min_equal: float
    max_psi: float
    features: tuple[FeatureSkew, ...]

    @property
    def skewed(self) -> tuple[str, ...]:
        """Names of the features that are not within bounds."""
        return tuple(each.feature for each in self.features if each.skewed)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "skewed": list(self.skewed)}


def measure_skew(
    repo: FeatureRepo,
    service: str,
    rows: Columns,
    moments: NDArray[np.int64],
    *,
    on_missing: Any = "default",
    defaults: Mapping[str, Any] | None = None,
    full_names: bool = False,
    min_equal: float = 0.99,
    max_psi: float = 0.2,
    tolerance: float = 0.0,
) -> SkewReport:
    """Compare features as they were read with those that held at the rows' moments.

    ``rows`` (n) has the service's keys, request columns and features as read; ``moments`` is int64
    (n,), µs since 1970 (UTC). Numbers within ``tolerance`` of each other, relative to the larger,
    count as equal. A feature is skewed when fewer than ``min_equal`` of its rows are equal, or its
    index is over ``max_psi``. Raises ConfigError when a column is not there.
    """
    spec = repo.service(service)
    maker = RowMaker(spec, on_missing, defaults, full_names)
    for name in (*spec.keys, *spec.request, *maker.outputs):
        if name not in rows:
            raise ConfigError(
                f"the captured rows have no column {name!r}, which service {service!r} has now."
                f"{did_you_mean(name, rows)}"
            )
    if not len(moments):
        raise ConfigError("there are no captured rows to compare")
    again = history_columns(spec.views, maker, rows, moments, Sources())
    again.pop(ROW_ERROR, None)
    found = []
    for name, offline in again.items():
        measured = compare(name, rows[name], offline, tolerance)
        skewed = measured["equal"] < min_equal or measured["psi"] > max_psi
        found.append(FeatureSkew(skewed=skewed, **measured))
    return SkewReport(service, len(moments), min_equal, max_psi, tuple(found))


def compare(
    name: str, online: NDArray[Any], offline: NDArray[Any], tolerance: float = 0.0
) -> dict[str, Any]:
    """The measures of one feature, (n,) each; see `FeatureSkew`."""
    numeric = offline.dtype.kind in "iufbM"
    ours = _numbers(online) if numeric else _texts(online)
    theirs = _numbers(offline) if numeric else _texts(offline)
    missing = [_missing(each) for each in (ours, theirs)]
    both = ~missing[0] & ~missing[1]
    same = missing[0] & missing[1]
    largest: float | None = None
    distance: float | None = None
    if numeric:
        difference = np.abs(ours - theirs)
        scale = np.maximum(np.abs(ours), np.abs(theirs))
        same |= both & ((ours == theirs) | (difference <= tolerance * scale))
        largest = float(difference[both].max()) if both.any() else 0.0
        distance = _wasserstein(ours[~missing[0]], theirs[~missing[1]])
    else:
        same |= both & (ours == theirs)
    return {
        "feature": name,
        "rows": len(offline),
        "equal": float(same.mean()),
        "max_difference": largest,
        "psi": _psi(ours, theirs, missing[0], missing[1], numeric),
        "wasserstein": distance,
        "missing_online": float(missing[0].mean()),
        "missing_offline": float(missing[1].mean()),
    }


def _numbers(values: NDArray[Any]) -> NDArray[np.float64]:
    """As floats, NaN for what is missing; moments as seconds."""
    if values.dtype == object:
        values = np.array([np.nan if value is None else value for value in values.tolist()])
    if values.dtype.kind == "M":
        whole = values.astype("datetime64[us]")
        return np.where(np.isnat(whole), np.nan, whole.astype(np.int64) / 1e6)
    return values.astype(np.float64)


def _texts(values: NDArray[Any]) -> NDArray[Any]:
    """As texts, None for what is missing."""
    listed = [None if v is None or v != v else v for v in values.tolist()]
    texts = np.empty(len(listed), dtype=object)
    texts[:] = [None if value is None else str(value) for value in listed]
    return texts


def _missing(values: NDArray[Any]) -> NDArray[np.bool_]:
    if values.dtype == object:
        return np.array([value is None for value in values.tolist()], dtype=bool)
    return np.asarray(np.isnan(values))


def _psi(
    online: NDArray[Any],
    offline: NDArray[Any],
    no_online: NDArray[np.bool_],
    no_offline: NDArray[np.bool_],
    numeric: bool,
) -> float:
    """The population stability index: sum of (p - q) ln(p / q) over bins."""
    given = offline[~no_offline]
    if numeric:
        inner = np.linspace(0, 1, _BINS + 1)[1:-1]
        cuts = np.unique(np.quantile(given, inner)) if len(given) else np.empty(0)
        bins = [np.searchsorted(cuts, each, side="left") for each in (online, offline)]
        count = len(cuts) + 1
    else:
        names, counts = np.unique(given.astype(str), return_counts=True)
        common = names[np.argsort(-counts)][: _BINS * 10]
        place = {name: number for number, name in enumerate(common.tolist())}
        count = len(place) + 1
        bins = [
            np.array([place.get(value, count - 1) for value in each.tolist()])
            for each in (online, offline)
        ]
    shares = []
    for each, absent in zip(bins, (no_online, no_offline), strict=True):
        marked = np.where(absent, count, each)
        shares.append(np.bincount(marked, minlength=count + 1) / len(marked))
    p, q = (np.maximum(share, _FEW) for share in shares)
    return float(((p - q) * np.log(p / q)).sum())


def _wasserstein(online: NDArray[np.float64], offline: NDArray[np.float64]) -> float:
    """Distance of two samples in standard deviations of the second; 0 where one is empty."""
    try:
        from scipy.stats import wasserstein_distance
    except ImportError:
        raise MissingExtraError("scipy", "features") from None
    if not len(online) or not len(offline):
        return 0.0
    spread = float(offline.std())
    distance = float(wasserstein_distance(online, offline))
    return distance / spread if spread > 0 else distance
