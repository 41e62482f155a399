"""History features see the past of a flight and nothing else."""

from datetime import datetime, timedelta

import numpy as np
import polars as pl
import pytest

from graphs.flights_model.features import LOOKED_UP, VIEWS, build
from graphs.flights_model.nodes import FlightFeatures
from graphs.flights_model.timeline import Timeline

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
    node = FlightFeatures(str(directory))
    node.setup()
    keys = {
        "origin": "EWR",
        "carrier": "UA",
        "carrier_origin": "UA-EWR",
        "route": "EWR-IAH",
        "number": "UA1",
        "tailnum": "N1",
    }
    columns = {name: np.array([key], dtype=object) for name, key in keys.items()}
    seconds = int((as_of - datetime(1970, 1, 1)).total_seconds())
    found = node.predict(columns | {"as_of": np.array([seconds])})
    return {name: float(values[0]) for name, values in found.items()}


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
    assert honest["tail_delay_1"] == 4.0
    assert honest["tail_delay_4"] == 7.0


def test_an_outcome_counts_from_its_very_minute(tmp_path):
    landed = flight(NOON - timedelta(hours=2), 0)
    assert landed["arrived_at"] == NOON
    before = look_up(tmp_path / "a", [landed], NOON - timedelta(seconds=1))
    assert np.isnan(before["tail_delay_1"])
    assert before["origin_delay_1h"] == 0.0
    assert look_up(tmp_path / "b", [landed], NOON)["tail_delay_1"] == 0.0


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
    assert tuple(found) == LOOKED_UP
    assert all(np.isnan(v) for v in found.values())


@pytest.mark.parametrize("seed", range(5))
def test_look_ups_agree_with_a_plain_search(seed):
    chance = np.random.default_rng(seed)
    names = [f"N{i}" for i in chance.integers(0, 5, 200)]
    minutes = chance.permutation(1000)[:200]
    known_at = np.datetime64("2013-01-01T00:00", "us") + minutes * np.timedelta64(60, "s")
    values = chance.normal(size=(200, 2)).astype(np.float32)
    ttl = timedelta(minutes=60)
    timeline = Timeline(names, known_at, values, ttl)

    wanted = np.array([f"N{i}" for i in chance.integers(0, 7, 300)] + [None], dtype=object)
    at = chance.integers(0, 1100, 301)
    start = int(np.datetime64("2013-01-01", "s").astype(np.int64))
    found = timeline.as_of(wanted, start + at * 60)

    for i, (name, minute) in enumerate(zip(wanted, at, strict=True)):
        seen = [j for j in range(200) if names[j] == name and minute - 60 <= minutes[j] <= minute]
        expected = values[max(seen, key=lambda j: minutes[j])] if seen else [np.nan, np.nan]
        np.testing.assert_array_equal(found[:, i], expected)


def test_names_of_views_and_values_are_unique():
    assert len({view.name for view in VIEWS}) == len(VIEWS)
    assert len(set(LOOKED_UP)) == len(LOOKED_UP)
