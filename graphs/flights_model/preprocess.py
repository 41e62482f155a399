"""First node of the flights graph: from a request to keys, calendar and reference columns."""

from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import numpy as np
import polars as pl
from numpy.typing import NDArray

from graphs.flights_model.data import NEW_YORK
from graphs.flights_model.schema import flights_dir
from twinpath import Node
from twinpath.errors import ConfigError
from twinpath.graph.columns import Columns

#: Unless the request says when it asks, features may use what was known this long before the
#: scheduled departure.
LEAD = timedelta(hours=1)

CARRIERS = (
    *("9E", "AA", "AS", "B6", "DL", "EV", "F9", "FL"),
    *("HA", "MQ", "OO", "UA", "US", "VX", "WN", "YV"),
)
ORIGINS = ("EWR", "JFK", "LGA")

#: float32 model features that need no history.
STATIC = (
    "minute_of_day",
    "weekday",
    "carrier_code",
    "origin_code",
    "distance",
    "dest_lat",
    "dest_lon",
    "plane_year",
    "plane_seats",
)


class Preprocess(Node):
    """Derives local time, keys of the feature views, and facts about route and aircraft.

    What is not known (an airline, a destination or an aircraft never seen, or no aircraft
    assigned) becomes NaN, which the models take as missing.
    """

    inputs = {
        "carrier": "str",
        "flight": "int64",
        "tailnum": "str",
        "origin": "str",
        "dest": "str",
        "scheduled_departure": "datetime64[us]",
        "asked_at": "datetime64[us]",
    }
    outputs = {
        "as_of": "datetime64[us]",
        "route": "str",
        "origin_hour": "str",
        "carrier_origin": "str",
        "number": "str",
        **dict.fromkeys(STATIC, "float32"),
    }

    def __init__(self, data_dir: str | None = None) -> None:
        """Take the example's directory; `flights_dir` names the default."""
        self.data_dir = data_dir

    def setup(self) -> None:
        """Load the reference tables.

        Raises:
            ConfigError: the data was not prepared.
        """
        data = flights_dir(self.data_dir) / "data"
        if not data.is_dir():
            raise ConfigError(f"no data in {data}: run python -m graphs.flights_model.train")
        self._local = LocalClock(NEW_YORK)
        self._carriers = _Facts((c, (float(i),)) for i, c in enumerate(CARRIERS))
        self._origins = _Facts((o, (float(i),)) for i, o in enumerate(ORIGINS))
        dests = pl.read_parquet(data / "dests.parquet").select("dest", "distance", "lat", "lon")
        self._dests = _Facts((dest, facts) for dest, *facts in dests.iter_rows())
        planes = pl.read_parquet(data / "planes.parquet").select("tailnum", "year", "seats")
        self._planes = _Facts((tail, facts) for tail, *facts in planes.iter_rows())

    def predict(self, columns: Columns) -> Columns:
        """Return `outputs`; `as_of` (UTC) is the moment whose knowledge counts."""
        carrier, origin, dest = (columns[c].tolist() for c in ("carrier", "origin", "dest"))
        number = columns["flight"].tolist()
        departure, asked_at = columns["scheduled_departure"], columns["asked_at"]
        seconds = departure.astype("datetime64[s]").astype(np.int64)
        local = self._local(seconds)
        minute = local // 60 % 1440
        hours = (minute // 60).tolist()
        distance, lat, lon = self._dests(dest)
        year, seats = self._planes(columns["tailnum"].tolist())
        return {
            "as_of": np.where(np.isnat(asked_at), departure - np.timedelta64(LEAD), asked_at),
            "route": _strings(f"{o}-{d}" for o, d in zip(origin, dest, strict=True)),
            "origin_hour": _strings(f"{o}-{h}" for o, h in zip(origin, hours, strict=True)),
            "carrier_origin": _strings(f"{c}-{o}" for c, o in zip(carrier, origin, strict=True)),
            "number": _strings(f"{c}{n}" for c, n in zip(carrier, number, strict=True)),
            "minute_of_day": minute.astype(np.float32),
            # 1970-01-01 was a Thursday; Monday is 0.
            "weekday": ((local // 86_400 + 3) % 7).astype(np.float32),
            "carrier_code": self._carriers(carrier)[0],
            "origin_code": self._origins(origin)[0],
            "distance": distance,
            "dest_lat": lat,
            "dest_lon": lon,
            "plane_year": year,
            "plane_seats": seats,
        }


class LocalClock:
    """Turns UTC seconds into local seconds of a zone, for whole arrays."""

    _YEARS = (1990, 2040)

    def __init__(self, zone: str) -> None:
        starts, offsets = zip(*_transitions(ZoneInfo(zone), *self._YEARS), strict=True)
        self._starts = np.array(starts, dtype=np.int64)
        self._offsets = np.array(offsets, dtype=np.int64)

    def __call__(self, seconds: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return (n,) local seconds for (n,) UTC seconds since 1970."""
        at = np.searchsorted(self._starts, seconds, side="right") - 1
        local: NDArray[np.int64] = seconds + self._offsets[np.maximum(at, 0)]
        return local


def _transitions(zone: ZoneInfo, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Yield (UTC second, offset in seconds from then on), to the hour."""
    known: timedelta | None = None
    moment, end = datetime(first, 1, 1, tzinfo=UTC), datetime(last, 1, 1, tzinfo=UTC)
    while moment < end:
        day = moment + timedelta(days=1)
        if known is None or day.astimezone(zone).utcoffset() != known:
            while (offset := moment.astimezone(zone).utcoffset()) == known:
                moment += timedelta(hours=1)
            known = offset
            yield int(moment.timestamp()), int((offset or timedelta()).total_seconds())
        moment = day


class _Facts:
    """Numbers by name, looked up for whole columns; unknown names and None get NaN."""

    def __init__(self, rows: Iterable[tuple[str, Sequence[float | None]]]) -> None:
        named = dict(rows)
        self._row: dict[str | None, int] = {name: i for i, name in enumerate(named)}
        table = np.array([*named.values()], dtype=np.float32)
        #: (facts, names + 1); the last column is what an unknown name gets.
        self._facts = np.concatenate([table, np.full_like(table[:1], np.nan)]).T.copy()

    def __call__(self, names: list[str | None]) -> NDArray[np.float32]:
        """Return (facts, n)."""
        get = self._row.get
        return self._facts[:, [get(name, -1) for name in names]]


def _strings(values: Iterator[str]) -> NDArray[np.object_]:
    return np.array([*values], dtype=object)
