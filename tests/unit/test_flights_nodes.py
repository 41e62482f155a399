"""The nodes of the flights graph take what reality sends, one row or many."""

import json
import pickle
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import numpy as np
import polars as pl
import pytest

from graphs.flights_model.data import whole_directory
from graphs.flights_model.decide import _NAMED, _WEIGHED, NO_REASON, Decide
from graphs.flights_model.nodes import FEATURES, DelayModel, load_model, save_model
from graphs.flights_model.preprocess import STATIC, LocalClock, Preprocess
from twinpath.errors import ConfigError


def text(*values):
    return np.array(values, dtype=object)


@pytest.fixture
def clean(tmp_path):
    (tmp_path / "data").mkdir()
    pl.DataFrame({"dest": ["IAH"], "distance": [1400.0], "lat": [30.0], "lon": [-95.0]}
                 ).write_parquet(tmp_path / "data" / "dests.parquet")  # fmt: skip
    pl.DataFrame({"tailnum": ["N1"], "year": [None], "seats": [149]},
                 schema={"tailnum": pl.String, "year": pl.Int64, "seats": pl.Int64}
                 ).write_parquet(tmp_path / "data" / "planes.parquet")  # fmt: skip
    node = Preprocess(str(tmp_path))
    node.setup()
    return node


def test_preprocess_makes_keys_and_local_time(clean):
    found = clean.predict(
        {
            "carrier": text("UA", "??"),
            "flight": np.array([15, 3]),
            "tailnum": text("N1", None),
            "origin": text("EWR", "JFK"),
            "dest": text("IAH", "???"),
            "scheduled_departure": np.array(
                ["2013-07-01T16:30", "2013-12-24T04:59"], dtype="datetime64[us]"
            ),
            "asked_at": np.array(["NaT", "2013-12-23T17:00"], dtype="datetime64[us]"),
        }
    )
    assert set(found) == set(Preprocess.outputs)
    assert found["route"].tolist() == ["EWR-IAH", "JFK-???"]
    assert found["carrier_origin"].tolist() == ["UA-EWR", "??-JFK"]
    assert found["origin_hour"].tolist() == ["EWR-12", "JFK-23"]
    assert found["number"].tolist() == ["UA15", "??3"]
    # Half past noon on a Monday in summer; a minute to midnight on a Monday in winter.
    assert found["minute_of_day"].tolist() == [12 * 60 + 30, 24 * 60 - 1]
    assert found["weekday"].tolist() == [0, 0]
    # An hour before departure, unless it is said when the question is asked.
    wanted = np.array(["2013-07-01T15:30", "2013-12-23T17:00"], dtype="datetime64[us]")
    assert found["as_of"].tolist() == wanted.tolist()
    for name in ("carrier_code", "distance", "dest_lat", "dest_lon", "plane_seats"):
        assert np.isnan(found[name]).tolist() == [False, True], name
    assert np.isnan(found["plane_year"]).all()
    assert all(found[name].dtype == np.float32 for name in STATIC)


def test_local_time_is_right_at_every_hour_of_years():
    zone = ZoneInfo("America/New_York")
    begin = int(datetime(2005, 1, 1, tzinfo=UTC).timestamp())
    seconds = begin + 3600 * np.arange(0, 24 * 366 * 4)
    expected = [
        s + datetime.fromtimestamp(s, zone).utcoffset().total_seconds() for s in seconds.tolist()
    ]
    np.testing.assert_array_equal(LocalClock("America/New_York")(seconds), expected)


@pytest.fixture
def decide(tmp_path):
    (tmp_path / "model").mkdir()
    linear = dict.fromkeys(_WEIGHED, (0.0, 0.0))
    linear |= {"tail_delay_1": (5.0, 0.1), "minute_of_day": (800.0, 0.001)}
    (tmp_path / "model" / "reasons.json").write_text(json.dumps(linear))
    node = Decide(threshold=0.5, data_dir=str(tmp_path))
    node.setup()
    return node


def opinions(p_delay, **changes):
    n = len(p_delay)
    columns = {name: np.full(n, np.nan, dtype=np.float32) for name in _WEIGHED}
    columns |= {name: np.full(n, name, dtype=object) for name in _NAMED}
    columns |= {
        "p_delay": np.array(p_delay),
        "p_review": np.full(n, np.nan),
        "reviewed": np.zeros(n, dtype=bool),
    }
    return columns | {name: np.asarray(values) for name, values in changes.items()}


def test_a_review_counts_half_and_only_where_there_was_one(decide):
    found = decide.predict(opinions([0.45, 0.45], p_review=[0.65, np.nan], reviewed=[True, False]))
    assert found["p_delay"].tolist() == pytest.approx([0.55, 0.45])
    assert found["delayed"].tolist() == [True, False]


def test_reasons_point_the_way_of_the_answer(decide):
    late = np.array([42, 42, -10, np.nan], dtype=np.float32)
    found = decide.predict(
        opinions([0.9, 0.1, 0.1, 0.9], tail_delay_1=late, minute_of_day=np.full(4, 1110.0))
    )
    assert found["reason"].tolist() == [
        "aircraft tailnum last 42 min late; evening departure from origin",
        NO_REASON,
        "aircraft tailnum last on time",
        "evening departure from origin",
    ]


def test_no_rows_in_no_rows_out(decide):
    assert {len(v) for v in decide.predict(opinions([])).values()} == {0}


def test_nodes_name_the_command_when_nothing_was_prepared(tmp_path):
    for node in (Preprocess(str(tmp_path)), DelayModel(str(tmp_path)), Decide(0.5, str(tmp_path))):
        with pytest.raises(ConfigError, match=r"python -m graphs\.flights_model\.train"):
            node.setup()


def test_a_model_of_other_features_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "m.joblib"
    save_model(path, "model")
    assert load_model(path) == "model"
    monkeypatch.setattr("graphs.flights_model.nodes.FEATURES", FEATURES[1:])
    with pytest.raises(ConfigError, match="other features"):
        load_model(path)


def test_a_set_up_node_pickles_as_its_configuration(decide):
    again = pickle.loads(pickle.dumps(decide))
    assert (again.threshold, again.data_dir) == (decide.threshold, decide.data_dir)
    assert not hasattr(again, "_linear")


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    def fill_and_fail():
        with whole_directory(tmp_path / "made") as out:
            (out / "half").touch()
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fill_and_fail()
    assert list(tmp_path.iterdir()) == []
