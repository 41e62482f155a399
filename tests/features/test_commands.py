"""``twinpath features …`` on a real repository, from definitions to skew."""

import json
import shutil
import textwrap
from datetime import timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from tests.features.shop import NOW, every_type, pairs
from tests.features.test_history import read
from tests.features.test_lookup import Visit
from twinpath import FeatureLookup, Graph
from twinpath.cli import app
from twinpath.errors import ConfigError, InputError
from twinpath.features.materialise import materialise
from twinpath.features.repo import FeatureRepo
from twinpath.online.capturing import capture
from twinpath.online.feature_args import CaptureArgs

pytestmark = pytest.mark.timeout(300)
DEFINITIONS = """
    from pathlib import Path
    from tests.features.shop import definitions
    everything = definitions(Path({folder!r}))
"""


def run(*words: str, fails: bool = False):
    result = CliRunner().invoke(app, ["features", *words], env={"COLUMNS": "200"})
    if not fails:
        assert result.exit_code == 0, (result.output, result.exception)
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("commands") / "repo"
    folder.mkdir()
    (folder / "feature_store.yaml").write_text(
        "project: shop\nprovider: local\nregistry: registry.db\n"
        "online_store: {type: sqlite, path: online.db}\nentity_key_serialization_version: 3\n"
    )
    text = textwrap.dedent(DEFINITIONS).format(folder=str(folder))
    (folder / "definitions.py").write_text(text)
    every_type().write_parquet(folder / "types.parquet")
    pairs().write_parquet(folder / "visits.parquet")
    return folder


def test_a_repository_is_applied_materialised_shown_and_pushed_to(folder, tmp_path):
    repo = ("--repo", str(folder))
    assert "types_only" in run("apply", *repo).stdout
    applied = json.loads(run("apply", *repo, "--json").stdout)
    assert applied["views"] == ["types", "visits"]
    assert applied["on_demand"] == ["worth"]

    before = json.loads(run("show", "visits_only", *repo, "--json").stdout)
    assert [view["materialised_to"] for view in before[0]["views"]] == [None, None]
    assert before[0]["views"][0]["keys"] == ["user_id", "shop"]
    assert "never" in run("show", *repo).stdout

    done = json.loads(run("materialize", *repo, "--end", NOW.isoformat(), "--json").stdout)
    assert {each["view"]: each["written"] for each in done} == {"types": 32, "visits": 60}
    again = run("materialize", *repo, "--end", NOW.isoformat(), "--view", "visits").stdout
    assert "visits" in again
    assert "types" not in again
    assert "2024-05-01" in run("show", *repo).stdout

    row = {"user_id": "cli", "shop": 1, "visits": 8, "spent": None}
    lines = tmp_path / "rows.jsonl"
    lines.write_text(json.dumps(row) + "\n\n" + json.dumps(row | {"shop": 2}) + "\n")
    assert "2 rows" in run("push", "visits", str(lines), *repo).stdout
    pl.DataFrame([row | {"shop": 3}]).write_parquet(tmp_path / "rows.parquet")
    run("push", "visits", str(tmp_path / "rows.parquet"), *repo)
    keys = {"user_id": ["cli"] * 3, "shop": [1, 2, 3]}
    assert read(FeatureRepo(folder), "visits", keys)["visits"] == [8, 8, 8]


def test_what_is_wrong_is_named(folder, tmp_path):
    repo = ("--repo", str(folder))
    run("apply", *repo)
    for words, kind, says in (
        (("show", "--repo", str(tmp_path)), ConfigError, "expected a feature_store.yaml"),
        (("show", "typs_only", *repo), ConfigError, "Did you mean 'types_only'"),
        (("materialize", *repo, "--view", "visit"), ConfigError, "Did you mean 'visits'"),
        (("push", "visits", "none.jsonl", *repo), ConfigError, "none.jsonl does not exist"),
        (("skew", str(tmp_path), *repo), ConfigError, "no captured rows"),
    ):
        result = run(*words, fails=True)
        assert isinstance(result.exception, kind), (words, result.output)
        assert says in str(result.exception)
    lines = tmp_path / "rows.jsonl"
    lines.write_text('{"user_id": \n')
    result = run("push", "visits", str(lines), *repo, fails=True)
    assert isinstance(result.exception, InputError)
    assert "line 1" in str(result.exception)
    bad = run("materialize", *repo, "--end", "noon", fails=True)
    assert bad.exit_code == 2
    assert "expected ISO 8601" in bad.stderr


def served(folder: Path, moments: list, captured: Path) -> Path:
    """Rows that ask at these moments, read online with capturing on; the capture's folder. What
    is online is materialised up to each moment first, as it would be at that time."""
    from tests.features.test_lookup import Spent
    from twinpath.graph.columns import Columns
    from twinpath.graph.local import LocalRunner

    repo = FeatureRepo(folder)
    graph = Graph("shop", input=Visit, output=Spent)
    with graph as rows:
        graph.output(
            FeatureLookup("visits_only", str(folder), as_of="asked_at", timeout_ms=60_000)(rows)
        )
    users = np.array([f"user-{i % 20}" for i in range(60)], object)
    shops = np.array([i % 3 - 1 for i in range(60)])
    with LocalRunner(graph.plan) as runner:
        recorders = capture(runner._executor.nodes, CaptureArgs(folder=captured), "shop")
        for moment in moments:
            materialise(repo, end=moment, views=["visits"])
            asked: Columns = {
                "user_id": users,
                "shop": shops,
                "asked_at": np.full(60, np.datetime64(moment, "us")),
            }
            assert runner.run(asked).outcome.ok
        for recorder in recorders:
            recorder.close()
    return captured / "shop" / "feature_lookup"


def hourly() -> pl.DataFrame:
    """A row of each key every hour, with values that move."""
    rng = np.random.default_rng(2)
    return pl.DataFrame(
        [
            {
                "user_id": f"user-{i % 20}",
                "shop": i % 3 - 1,
                "event_timestamp": NOW - timedelta(hours=hour),
                "visits": int(rng.integers(1, 100)),
                "spent": float(rng.normal(100 + hour, 10)),
            }
            for hour in range(12)
            for i in range(60)
        ]
    )


MOMENTS = [NOW - timedelta(hours=h, minutes=-30) for h in (6, 5, 4, 3)]


@pytest.fixture
def fresh(folder, tmp_path) -> Path:
    """A repository of its own with hourly rows, applied."""
    target = tmp_path / "repo"
    target.mkdir()
    for name in ("feature_store.yaml", "types.parquet"):
        shutil.copy(folder / name, target / name)
    text = textwrap.dedent(DEFINITIONS).format(folder=str(target))
    (target / "definitions.py").write_text(text)
    hourly().write_parquet(target / "visits.parquet")
    run("apply", "--repo", str(target))
    return target


def test_without_a_fault_there_is_no_skew(fresh, tmp_path):
    captured = served(fresh, MOMENTS, tmp_path / "captured")
    found = json.loads(run("skew", str(captured), "--json").stdout)
    assert found["rows"] == 240
    assert found["skewed"] == []
    assert {each["feature"]: each["equal"] for each in found["features"]} == {
        "spent": 1,
        "a_visit": 1,
    }
    assert all(each["psi"] == 0 for each in found["features"])
    # There was something to compare.
    assert all(each["missing_offline"] < 0.5 for each in found["features"])


def test_features_that_are_an_hour_late_online_are_found(fresh, tmp_path):
    source = fresh / "visits.parquet"
    true = pl.read_parquet(source)
    # What fills the online store stamps each row an hour late; the history is right.
    true.with_columns(pl.col("event_timestamp") + timedelta(hours=1)).write_parquet(source)
    captured = served(fresh, MOMENTS, tmp_path / "captured")
    true.write_parquet(source)
    result = run("skew", str(captured), "--repo", str(fresh), fails=True)
    assert result.exit_code == 1
    assert "skewed: spent, a_visit" in result.stdout
    found = json.loads(run("skew", str(captured), "--json", fails=True).stdout)
    assert found["skewed"] == ["spent", "a_visit"]
    spent = found["features"][0]
    assert spent["equal"] < 0.1
    assert spent["max_difference"] > 1
    # Bounds that allow everything let it pass.
    run("skew", str(captured), "--min-equal", "0", "--max-psi", "1000")
