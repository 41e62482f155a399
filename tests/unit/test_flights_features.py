"""History features see the past of a flight and nothing else."""

from datetime import datetime, timedelta

import numpy as np
import polars as pl

from graphs.flights_model.features import LOOKED_UP, TREND, VIEWS, build
from twinpath.features.history import Sources, as_of_join
from twinpath.features.spec import ViewSpec

NOON = datetime(2013, 7, 1, 12)
FAR = datetime(2013, 1, 1)


def flight(scheduled: datetime, late_by: int, **changes):
    """One tidy row: two hours in the air, `late_by` minutes late both ways."""
    departed = scheduled + timedelta(minutes=late_by)
    known = {
        "carrier": "UA",
        "flight": 1,
        "tailnum": "N1",
        "origin": "EWR",
        "dest": "IAH",
        "scheduled_departure": scheduled,
        "dep_delay": late_by,
        "arr_delay": late_by,
        "departed_at": departed,
        "arrived_at": departed + timedelta(hours=2),
    }
    return known | changes


def observed(at: datetime, precip: float):
    calm = dict.fromkeys(("temp", "humid", "wind_speed", "wind_gust", "pressure", "visib"), 1.0)
    return {"origin": "EWR", "observed_at": at, "precip": precip, **calm}


def look_up(directory, flights, as_of: datetime, weather=None):
    """All features of UA 1, N1, EWR to IAH as of a moment, given what happened."""
    (directory / "data").mkdir(parents=True)
    pl.DataFrame(flights).write_parquet(directory / "data" / "flights.parquet")
    pl.DataFrame(weather or [observed(FAR, 0.0)]).write_parquet(
        directory / "data" / "weather.parquet"
    )
    build(directory)
    keys = {
        "origin": "EWR",
        "carrier": "UA",
        "origin_hour": "EWR-7",  # that of the flights that must not be seen yet
        "carrier_origin": "UA-EWR",
        "route": "EWR-IAH",
        "number": "UA1",
        "tailnum": "N1",
    }
    columns = {name: np.array([key], dtype=object) for name, key in keys.items()}
    moment = np.array([np.datetime64(as_of, "us").astype(np.int64)])
    found = {}
    for view in VIEWS:
        spec = ViewSpec(
            view.name,
            (view.key,),
            dict.fromkeys(view.values, "float32"),
            view.ttl.total_seconds(),
            "known_at",
            str(directory / "features" / f"{view.name}.parquet"),
        )
        joined = as_of_join(spec, columns, moment, Sources())
        held = joined.found[0]
        found |= {name: float(joined.values[name][0]) if held else np.nan for name in view.values}
    return found


def test_a_future_outcome_is_invisible(tmp_path):
    past = [flight(NOON - timedelta(hours=6), 10), flight(NOON - timedelta(hours=3), 4)]
    # Planned before the moment, but in the air at it; and one that leaves after it.
    planted = [
        flight(NOON - timedelta(hours=1), 999, departed_at=NOON + timedelta(minutes=1)),
        flight(NOON + timedelta(hours=1), 999),
    ]
    wet_later = [observed(NOON - timedelta(hours=1), 0.0), observed(NOON + timedelta(hours=1), 9.0)]
    honest = look_up(tmp_path / "a", past, NOON, wet_later[:1])
    with_leak = look_up(tmp_path / "b", past + planted, NOON, wet_later)
    np.testing.assert_equal(with_leak, honest)
    assert np.isnan(honest["origin_hour_delay_7d"])
    assert honest["tail_delay_1"] == 4.0
    assert honest["tail_delay_4"] == 7.0


def test_an_outcome_counts_from_its_very_minute(tmp_path):
    landed = flight(NOON - timedelta(hours=2), 0)
    assert landed["arrived_at"] == NOON
    before = look_up(tmp_path / "a", [landed], NOON - timedelta(seconds=1))
    assert np.isnan(before["tail_delay_1"])
    assert before["origin_delay_1h"] == 0.0
    assert look_up(tmp_path / "b", [landed], NOON)["tail_delay_1"] == 0.0


def test_an_hour_of_an_origin_is_that_of_its_own_clock(tmp_path):
    eleven_utc = [flight(NOON - timedelta(days=d, hours=1), 6 * d) for d in (1, 2)]
    other_hour = flight(NOON - timedelta(hours=5), 99)
    found = look_up(tmp_path, [*eleven_utc, other_hour], NOON)
    assert found["origin_hour_delay_7d"] == 9.0
    assert found["origin_hour_late_28d"] == 0.0


def test_a_cancelled_flight_has_no_outcome(tmp_path):
    never = dict.fromkeys(("dep_delay", "arr_delay", "departed_at", "arrived_at"))
    rows = [flight(NOON - timedelta(hours=4), 8), flight(NOON - timedelta(hours=3), 0, **never)]
    found = look_up(tmp_path, rows, NOON)
    assert found["number_delay_5"] == 8.0


def test_old_values_run_out(tmp_path):
    rows = [flight(NOON - timedelta(days=3), 8)]
    found = look_up(tmp_path, rows, NOON)
    assert np.isnan(found["tail_delay_1"])
    assert found["number_delay_5"] == 8.0


def test_every_view_gives_its_columns_for_unknown_keys(tmp_path):
    found = look_up(tmp_path, [flight(NOON, 5)], NOON - timedelta(days=1))
    assert (*found, TREND) == LOOKED_UP
    assert all(np.isnan(v) for v in found.values())


def test_names_of_views_and_values_are_unique():
    assert len({view.name for view in VIEWS}) == len(VIEWS)
    assert len(set(LOOKED_UP)) == len(LOOKED_UP)
