"""The point-in-time join against a plain loop over the rows, on random tables."""

from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl
import pytest

from twinpath.errors import ConfigError
from twinpath.features.decode import NEVER
from twinpath.features.history import Sources, as_of_join, scan_rows
from twinpath.features.spec import ViewSpec

START = datetime(2024, 3, 1, tzinfo=UTC)
HOUR_US = 3_600_000_000
START_US = int(START.timestamp()) * 1_000_000


def view(path, ttl_h=None, created=True, keys=("user", "shop")) -> ViewSpec:
    return ViewSpec(
        "spending",
        keys,
        {"amount": "float64", "visits": "int64", "word": "str"},
        None if ttl_h is None else ttl_h * 3600.0,
        "at",
        str(path),
        created_field="written" if created else None,
        key_types={"user": "str", "shop": "int64"},
    )


def history(rng, n: int) -> pl.DataFrame:
    """Unsorted rows with ties in key and moment, and nulls among the values."""
    hours = rng.integers(0, 48, n)
    return pl.DataFrame(
        {
            "user": [f"u{i}" for i in rng.integers(0, 4, n)],
            "shop": rng.integers(0, 2, n),
            "at": [START + timedelta(hours=int(h)) for h in hours],
            # Every one differs, so that a tie has one answer.
            "written": [START + timedelta(seconds=int(s)) for s in rng.permutation(n)],
            "amount": [None if rng.random() < 0.2 else float(rng.normal()) for _ in range(n)],
            "visits": [None if rng.random() < 0.2 else int(rng.integers(0, 9)) for _ in range(n)],
            "word": [None if rng.random() < 0.2 else f"w{i}" for i in range(n)],
        }
    )


def questions(rng, n: int):
    users = np.array([None if i == 9 else f"u{i % 6}" for i in rng.integers(0, 10, n)], object)
    keys = {"user": users, "shop": rng.integers(0, 3, n)}
    # Between the rows' hours, and on them.
    moments = START_US + rng.integers(-2, 60, n) * HOUR_US + rng.integers(0, 2, n) * 1
    return keys, moments.astype(np.int64)


def by_hand(rows: pl.DataFrame, keys, moments, ttl_h):
    """What the rule says, one row at a time."""
    listed = rows.to_dicts()
    for user, shop, moment in zip(keys["user"], keys["shop"], moments, strict=True):
        asked = datetime.fromtimestamp(0, UTC) + timedelta(microseconds=int(moment))
        held = [
            row
            for row in listed
            if row["user"] == user
            and row["shop"] == shop
            and row["at"] <= asked
            and (ttl_h is None or asked - row["at"] <= timedelta(hours=ttl_h))
        ]
        yield max(held, key=lambda row: (row["at"], row["written"]), default=None)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ttl_h", [None, 5])
@pytest.mark.parametrize("whole_bytes", [1 << 30, 0])
def test_each_row_gets_the_newest_values_not_after_its_moment(tmp_path, seed, ttl_h, whole_bytes):
    rng = np.random.default_rng(seed)
    rows = history(rng, 200)
    rows.write_parquet(tmp_path / "a.parquet", row_group_size=16)
    keys, moments = questions(rng, 150)
    sources = Sources(whole_bytes)
    # In two batches: with a bound on memory the second one needs other rows than the first.
    for half in (slice(0, 75), slice(75, 150)):
        part = {name: values[half] for name, values in keys.items()}
        joined = as_of_join(view(tmp_path / "a.parquet", ttl_h), part, moments[half], sources)
        expected = list(by_hand(rows, part, moments[half], ttl_h))
        assert joined.found.tolist() == [row is not None for row in expected]
        for place, row in enumerate(expected):
            if row is None:
                assert joined.event_us[place] == NEVER
                continue
            assert joined.event_us[place] == int(row["at"].timestamp()) * 1_000_000
            amount = joined.values["amount"][place]
            assert np.isnan(amount) if row["amount"] is None else amount == row["amount"]
            nulls = joined.nulls["visits"]
            assert (nulls is not None and nulls[place]) == (row["visits"] is None)
            assert row["visits"] is None or joined.values["visits"][place] == row["visits"]
            assert joined.values["word"][place] == row["word"]


def test_a_row_from_the_future_is_never_seen(tmp_path):
    rng = np.random.default_rng(7)
    honest = history(rng, 150).filter(pl.col("at") <= START + timedelta(hours=20))
    planted = honest.with_columns(
        at=START + timedelta(hours=20, microseconds=1),
        amount=pl.lit(1e9),
        visits=pl.lit(10**9, pl.Int64),
    )
    honest.write_parquet(tmp_path / "honest.parquet")
    pl.concat([planted, honest]).write_parquet(tmp_path / "leaky.parquet")
    keys, _ = questions(rng, 100)
    moments = np.full(100, START_US + 20 * HOUR_US)
    seen = [
        as_of_join(view(tmp_path / f"{name}.parquet"), keys, moments, Sources())
        for name in ("honest", "leaky")
    ]
    assert seen[0].found.any()
    np.testing.assert_array_equal(seen[0].found, seen[1].found)
    np.testing.assert_array_equal(seen[0].values["amount"], seen[1].values["amount"])
    # One microsecond later they are known: the planted rows are in reach of this check.
    later = as_of_join(view(tmp_path / "leaky.parquet"), keys, moments + 1, Sources())
    assert (later.values["amount"][later.found] == 1e9).all()


def test_a_value_holds_up_to_its_time_to_live_and_not_a_microsecond_longer(tmp_path):
    one = history(np.random.default_rng(0), 1).with_columns(at=START, shop=0, user=pl.lit("u"))
    one.write_parquet(tmp_path / "a.parquet")
    keys = {"user": np.array(["u"] * 4, object), "shop": np.zeros(4, np.int64)}
    moments = START_US + np.array([-1, 0, 5 * HOUR_US, 5 * HOUR_US + 1])
    joined = as_of_join(view(tmp_path / "a.parquet", 5), keys, moments, Sources())
    assert joined.found.tolist() == [False, True, True, False]


def test_null_keys_and_rows_without_a_moment_find_nothing(tmp_path):
    one = history(np.random.default_rng(0), 1).with_columns(
        at=START, shop=0, user=pl.lit(None, pl.String)
    )
    pl.concat([one, one.with_columns(user=pl.lit("u"))]).write_parquet(tmp_path / "a.parquet")
    keys = {"user": np.array([None, np.nan, "u", "u"], object), "shop": np.zeros(4, np.int64)}
    moments = np.array([START_US, START_US, NEVER, START_US])
    joined = as_of_join(view(tmp_path / "a.parquet"), keys, moments, Sources())
    assert joined.found.tolist() == [False, False, False, True]


def test_a_folder_of_files_and_other_units_of_time_are_one_source(tmp_path):
    rows = history(np.random.default_rng(3), 60)
    folder = tmp_path / "rows"
    folder.mkdir()
    rows[:30].write_parquet(folder / "a.parquet")
    rows[30:].write_parquet(folder / "b.parquet")
    rows.with_columns(
        pl.col("at").dt.cast_time_unit("ns").dt.replace_time_zone(None)
    ).write_parquet(tmp_path / "ns.parquet")
    keys, moments = questions(np.random.default_rng(3), 80)
    for whole_bytes in (1 << 30, 0):
        one, other = (
            as_of_join(view(path, 7), keys, moments, Sources(whole_bytes))
            for path in (folder, tmp_path / "ns.parquet")
        )
        np.testing.assert_array_equal(one.event_us, other.event_us)
        assert one.values["word"].tolist() == other.values["word"].tolist()


def test_a_source_is_read_once_when_it_is_small(tmp_path):
    path = tmp_path / "a.parquet"
    history(np.random.default_rng(1), 50).write_parquet(path)
    keys, moments = questions(np.random.default_rng(1), 20)
    sources = Sources()
    first = as_of_join(view(path), keys, moments, sources)
    path.rename(tmp_path / "away.parquet")
    again = as_of_join(view(path), keys, moments + 1, sources)
    assert again.found.sum() >= first.found.sum() > 0


def test_no_rows_ask_nothing_and_get_typed_columns(tmp_path):
    history(np.random.default_rng(1), 5).write_parquet(tmp_path / "a.parquet")
    keys = {"user": np.empty(0, object), "shop": np.empty(0, np.int64)}
    joined = as_of_join(view(tmp_path / "a.parquet"), keys, np.empty(0, np.int64), Sources())
    assert joined.values["amount"].dtype == np.float64
    assert joined.values["visits"].dtype == np.int64


def test_a_source_that_is_not_there_or_lacks_a_column_is_named(tmp_path):
    keys, moments = questions(np.random.default_rng(1), 2)
    with pytest.raises(ConfigError, match=r"'spending' has no file .*gone\.parquet"):
        as_of_join(view(tmp_path / "gone.parquet"), keys, moments, Sources())
    rows = history(np.random.default_rng(1), 5).rename({"amount": "amounts"})
    rows.write_parquet(tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"no column 'amount'. Did you mean 'amounts'"):
        as_of_join(view(tmp_path / "a.parquet"), keys, moments, Sources())


@pytest.mark.parametrize("zone", [None, "UTC", "America/New_York", "Asia/Kolkata"])
@pytest.mark.parametrize("unit", ["us", "ns", "ms"])
def test_a_source_is_cut_at_moments_whatever_zone_it_is_in(tmp_path, zone, unit):
    rows = history(np.random.default_rng(3), 200)
    at = pl.col("at").dt.cast_time_unit(unit)
    at = at.dt.replace_time_zone(None) if zone is None else at.dt.convert_time_zone(zone)
    rows.with_columns(at).write_parquet(tmp_path / "rows.parquet")
    low, high = START_US + 10 * HOUR_US, START_US + 20 * HOUR_US
    found = scan_rows(view(tmp_path / "rows.parquet"), low, high).collect()
    wanted = rows.filter(pl.col("at").dt.epoch("us").is_between(low, high))
    assert 0 < len(found) == len(wanted) < len(rows)
