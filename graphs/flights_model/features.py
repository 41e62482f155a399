"""Feature views: what was known of an entity, and since when.

A view is a table of rows `(key, known_at, values...)`: from `known_at` on, until the next row
of that entity or `ttl`, the values hold. Feast reads these tables as they are; its definitions
are in graphs/flights_features.

Invariant: the values of a row derive only from outcomes with a moment <= its `known_at`. So a
look-up as of a moment cannot see what happened later, whatever order the flights were planned in.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import polars as pl

from graphs.flights_model.data import NEW_YORK, whole_directory

LATE_MINUTES = 15


@dataclass(frozen=True, slots=True)
class View:
    """One feature view.

    `name`: the table's name. `key`: the column of a request batch that names the entity.
    `values`: float32 feature columns. `ttl`: how long a row holds.
    """

    name: str
    key: str
    values: tuple[str, ...]
    ttl: timedelta
    build: Callable[[pl.DataFrame, pl.DataFrame], pl.DataFrame]


def _departures(flights: pl.DataFrame) -> pl.DataFrame:
    """Departures as outcomes: `known_at`, `delay` in minutes, `late` 0/1."""
    return _outcomes(flights, "departed_at", "dep_delay")


def _arrivals(flights: pl.DataFrame) -> pl.DataFrame:
    return _outcomes(flights, "arrived_at", "arr_delay")


def _outcomes(flights: pl.DataFrame, moment: str, delay: str) -> pl.DataFrame:
    return flights.filter(pl.col(moment).is_not_null()).select(
        "carrier",
        "flight",
        "tailnum",
        "origin",
        "dest",
        "scheduled_departure",
        known_at=pl.col(moment),
        delay=pl.col(delay).cast(pl.Float64),
        late=(pl.col(delay) > LATE_MINUTES).cast(pl.Float64),
    )


def _rolling(
    outcomes: pl.DataFrame, entity: pl.Expr, **columns: tuple[str, str | int]
) -> pl.DataFrame:
    """Means per entity over a trailing window that ends with each outcome, itself included.

    Args:
        outcomes: rows of `_outcomes`.
        entity: expression that names the entity; rows where it is null are left out.
        columns: new column = (source column, window): a duration ("2h") or a count of rows.
    """
    rows = outcomes.with_columns(entity=entity).drop_nulls("entity").sort("entity", "known_at")
    means = {}
    for name, (source, window) in columns.items():
        column = pl.col(source)
        if isinstance(window, int):
            mean = column.rolling_mean(window, min_samples=1)
        else:
            mean = column.rolling_mean_by("known_at", window)
        means[name] = mean.over("entity").cast(pl.Float32)
    # Outcomes of the same minute: the last row has seen them all.
    return rows.select("entity", "known_at", **means).unique(
        ["entity", "known_at"], keep="last", maintain_order=True
    )


def _origin(flights: pl.DataFrame, _: pl.DataFrame) -> pl.DataFrame:
    return _rolling(
        _departures(flights),
        pl.col("origin"),
        origin_delay_1h=("delay", "1h"),
        origin_delay_3h=("delay", "3h"),
        origin_late_2h=("late", "2h"),
    )


def _carrier_origin(flights: pl.DataFrame, _: pl.DataFrame) -> pl.DataFrame:
    return _rolling(
        _departures(flights),
        pl.format("{}-{}", "carrier", "origin"),
        carrier_origin_delay_4h=("delay", "4h"),
        carrier_origin_late_4h=("late", "4h"),
    )


def _origin_hour(flights: pl.DataFrame, _: pl.DataFrame) -> pl.DataFrame:
    local = pl.col("scheduled_departure").dt.replace_time_zone("UTC").dt.convert_time_zone(NEW_YORK)
    return _rolling(
        _departures(flights),
        pl.format("{}-{}", "origin", local.dt.hour()),
        origin_hour_delay_7d=("delay", "7d"),
        origin_hour_late_28d=("late", "28d"),
    )


def _carrier(flights: pl.DataFrame, _: pl.DataFrame) -> pl.DataFrame:
    return _rolling(
        _arrivals(flights),
        pl.col("carrier"),
        carrier_delay_6h=("delay", "6h"),
        carrier_late_28d=("late", "28d"),
    )


def _route(flights: pl.DataFrame, _: pl.DataFrame) -> pl.DataFrame:
    return _rolling(
        _arrivals(flights),
        pl.format("{}-{}", "origin", "dest"),
        route_delay_6h=("delay", "6h"),
        route_late_28d=("late", "28d"),
    )


def _number(flights: pl.DataFrame, _: pl.DataFrame) -> pl.DataFrame:
    return _rolling(
        _arrivals(flights),
        pl.format("{}{}", "carrier", "flight"),
        number_late_20=("late", 20),
        number_delay_5=("delay", 5),
    )


def _tail(flights: pl.DataFrame, _: pl.DataFrame) -> pl.DataFrame:
    return _rolling(
        _arrivals(flights), pl.col("tailnum"), tail_delay_1=("delay", 1), tail_delay_4=("delay", 4)
    )


def _weather(_: pl.DataFrame, weather: pl.DataFrame) -> pl.DataFrame:
    readings = [c for c in weather.columns if c not in ("origin", "observed_at")]
    return weather.select(
        pl.col("origin").alias("entity"),
        pl.col("observed_at").alias("known_at"),
        *(pl.col(c).cast(pl.Float32) for c in readings),
    ).sort("entity", "known_at")


VIEWS = (
    View(
        "weather",
        "origin",
        ("temp", "humid", "wind_speed", "wind_gust", "precip", "pressure", "visib"),
        timedelta(hours=4),
        _weather,
    ),
    View(
        "origin",
        "origin",
        ("origin_delay_1h", "origin_delay_3h", "origin_late_2h"),
        timedelta(hours=3),
        _origin,
    ),
    View(
        "origin_hour",
        "origin_hour",
        ("origin_hour_delay_7d", "origin_hour_late_28d"),
        timedelta(days=7),
        _origin_hour,
    ),
    View(
        "carrier_origin",
        "carrier_origin",
        ("carrier_origin_delay_4h", "carrier_origin_late_4h"),
        timedelta(hours=5),
        _carrier_origin,
    ),
    View(
        "carrier", "carrier", ("carrier_delay_6h", "carrier_late_28d"), timedelta(days=7), _carrier
    ),
    View("route", "route", ("route_delay_6h", "route_late_28d"), timedelta(days=7), _route),
    View("number", "number", ("number_late_20", "number_delay_5"), timedelta(days=28), _number),
    View("tail", "tailnum", ("tail_delay_1", "tail_delay_4"), timedelta(days=2), _tail),
)

#: The feature service that has all views, and the feature that it computes from one of them.
SERVICE = "flight_delay_v1"
TREND = "origin_trend"

LOOKED_UP = (*(value for view in VIEWS for value in view.values), TREND)


def build(directory: Path, views: Sequence[View] = VIEWS) -> Path:
    """Write `directory`/features/<view>.parquet from the tidy tables; return that folder."""
    path = directory / "features"
    if path.is_dir():
        return path
    flights = pl.read_parquet(directory / "data" / "flights.parquet")
    weather = pl.read_parquet(directory / "data" / "weather.parquet")
    with whole_directory(path) as out:
        for view in views:
            table = view.build(flights, weather).rename({"entity": view.key})
            table.write_parquet(out / f"{view.name}.parquet")
    return path
