"""Last node of the flights graph: the decision, and a reason that a traveller understands."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from graphs.flights_model.schema import flights_dir
from twinpath import Node
from twinpath.errors import ConfigError
from twinpath.graph.columns import Columns

_Rows = NDArray[np.intp]

NO_REASON = "nothing stands out"


@dataclass(frozen=True, slots=True)
class Theme:
    """Features that speak of one thing, and how to say it.

    `phrase` takes columns and row positions and gives one text for each of these rows.
    """

    features: tuple[str, ...]
    phrase: Callable[[Columns, _Rows], list[str]]


class Decide(Node):
    """Joins both opinions, compares with the threshold, and says what speaks most for the answer.

    Reasons come from a linear model of the same target: what a theme adds to its log-odds,
    compared with a typical flight. Up to two themes that point the answer's way are named.
    """

    outputs = {"p_delay": "float64", "delayed": "bool", "reason": "str", "reviewed": "bool"}

    def __init__(self, threshold: float = 0.5, data_dir: str | None = None) -> None:
        """Take the probability from which a flight counts as delayed, and the directory."""
        self.threshold = threshold
        self.data_dir = data_dir

    def setup(self) -> None:
        """Load typical values and weights.

        Raises:
            ConfigError: the model was not trained.
        """
        path = flights_dir(self.data_dir) / "model" / "reasons.json"
        if not path.is_file():
            raise ConfigError(f"nothing at {path}: run python -m graphs.flights_model.train")
        self._linear: dict[str, tuple[float, float]] = json.loads(path.read_text())

    def predict(self, columns: Columns) -> Columns:
        """Return `outputs`; probabilities are the mean of both opinions where there are two."""
        p_delay, reviewed = columns["p_delay"], columns["reviewed"]
        p_delay = np.where(reviewed, (p_delay + columns["p_review"]) / 2, p_delay)
        delayed = p_delay >= self.threshold
        return {
            "p_delay": p_delay,
            "delayed": delayed,
            "reason": self._reasons(columns, delayed),
            "reviewed": reviewed,
        }

    def _reasons(self, columns: Columns, delayed: NDArray[np.bool_]) -> NDArray[np.object_]:
        # (themes, n): how much each theme speaks for the answer; missing values say nothing.
        speaks = np.stack([self._log_odds(columns, theme.features) for theme in THEMES])
        speaks *= np.where(delayed, 1.0, -1.0)
        rows = np.arange(len(delayed))
        reasons = np.full(len(delayed), NO_REASON, dtype=object)
        for separator in ("", "; "):
            best = speaks.argmax(axis=0)
            said = speaks[best, rows] > 0.05
            for number, theme in enumerate(THEMES):
                here = np.flatnonzero(said & (best == number))
                if not here.size:
                    continue
                texts = theme.phrase(columns, here)
                if separator:
                    before = reasons[here].tolist()
                    texts = [b + separator + t for b, t in zip(before, texts, strict=True)]
                reasons[here] = texts
            speaks[best, rows] = -np.inf
        return reasons

    def _log_odds(self, columns: Columns, features: Sequence[str]) -> NDArray[np.float64]:
        total = np.zeros(len(columns[features[0]]))
        for feature in features:
            typical, weight = self._linear[feature]
            total += np.nan_to_num((columns[feature] - typical) * weight)
        return total


def _whole(columns: Columns, name: str, rows: _Rows, scale: float = 1.0) -> list[int]:
    """Rounded values; 0 where missing."""
    values = np.nan_to_num(columns[name][rows])
    whole: list[int] = np.rint(values * scale).astype(np.int64).tolist()
    return whole


def _texts(columns: Columns, name: str, rows: _Rows) -> list[str]:
    texts: list[str] = columns[name][rows].tolist()
    return texts


def _late(minutes: int) -> str:
    return f"{minutes} min late" if minutes > 0 else "on time"


def _hour(columns: Columns, rows: _Rows) -> list[str]:
    part = np.searchsorted((9 * 60, 12 * 60, 17 * 60, 21 * 60), columns["minute_of_day"][rows])
    names = ("early", "morning", "afternoon", "evening", "night")
    origins = _texts(columns, "origin", rows)
    return [f"{names[p]} departure from {o}" for p, o in zip(part.tolist(), origins, strict=True)]


def _weather(columns: Columns, rows: _Rows) -> list[str]:
    wet = columns["precip"][rows] > 0
    dim = columns["visib"][rows] < 5
    windy = columns["wind_speed"][rows] > 20
    kind = np.select([wet, dim, windy], [0, 1, 2], default=3)
    names = ("rain or snow at", "low visibility at", "strong wind at", "weather at")
    origins = _texts(columns, "origin", rows)
    return [f"{names[k]} {o}" for k, o in zip(kind.tolist(), origins, strict=True)]


def _airport(columns: Columns, rows: _Rows) -> list[str]:
    minutes = _whole(columns, "origin_delay_1h", rows)
    origins = _texts(columns, "origin", rows)
    return [f"{o} departures {_late(m)}" for o, m in zip(origins, minutes, strict=True)]


def _airline(columns: Columns, rows: _Rows) -> list[str]:
    minutes = _whole(columns, "carrier_delay_6h", rows)
    carriers = _texts(columns, "carrier", rows)
    return [f"{c} arrivals {_late(m)}" for c, m in zip(carriers, minutes, strict=True)]


def _airline_here(columns: Columns, rows: _Rows) -> list[str]:
    minutes = _whole(columns, "carrier_origin_delay_4h", rows)
    pairs = _texts(columns, "carrier_origin", rows)
    return [f"{p} departures {_late(m)}" for p, m in zip(pairs, minutes, strict=True)]


def _route(columns: Columns, rows: _Rows) -> list[str]:
    percent = _whole(columns, "route_late_28d", rows, 100)
    routes = _texts(columns, "route", rows)
    return [f"{p} % late on {r} lately" for r, p in zip(routes, percent, strict=True)]


def _number(columns: Columns, rows: _Rows) -> list[str]:
    percent = _whole(columns, "number_late_20", rows, 100)
    numbers = _texts(columns, "number", rows)
    return [f"{f} late in {p} % of its last flights" for f, p in zip(numbers, percent, strict=True)]


def _aircraft(columns: Columns, rows: _Rows) -> list[str]:
    minutes = _whole(columns, "tail_delay_1", rows)
    tails = _texts(columns, "tailnum", rows)
    return [f"aircraft {t} last {_late(m)}" for t, m in zip(tails, minutes, strict=True)]


THEMES = (
    Theme(("minute_of_day",), _hour),
    Theme(("temp", "humid", "wind_speed", "precip", "pressure", "visib"), _weather),
    Theme(("origin_delay_1h", "origin_delay_3h", "origin_late_2h"), _airport),
    Theme(("carrier_delay_6h", "carrier_late_28d"), _airline),
    Theme(("carrier_origin_delay_4h", "carrier_origin_late_4h"), _airline_here),
    Theme(("route_delay_6h", "route_late_28d"), _route),
    Theme(("number_late_20", "number_delay_5"), _number),
    Theme(("tail_delay_1", "tail_delay_4"), _aircraft),
)

#: Columns that the reasons are made from.
_WEIGHED = tuple(feature for theme in THEMES for feature in theme.features)
_NAMED = ("origin", "carrier", "tailnum", "route", "number", "carrier_origin")
Decide.inputs = {
    "p_delay": "float64",
    "p_review": "float64",
    "reviewed": "bool",
    **dict.fromkeys(_NAMED, "str"),
    **dict.fromkeys(_WEIGHED, "float32"),
}
