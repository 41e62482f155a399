"""The command line of rollouts on a registry in a file: reports first, then the rollout itself."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import ray
from rolling import HERE, MODEL, ROOT, register, rows, truth
from rollout_graphs import CARRIERS
from typer.testing import CliRunner, Result

from twinpath.cli import app
from twinpath.errors import BatchJobError, ConfigError, RolloutError
from twinpath.online.rollouts.gates import REQUIRE_TAG
from twinpath.registry.client import Registry

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
GRAPH = "rollout_graphs:graph"
Run = Callable[..., Result]


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """Versions 1 (serves), 2 (as good), 3 (wrong for one carrier), and a Ray to score with."""
    folder = tmp_path_factory.mktemp("commands")
    uri = f"sqlite:///{folder}/mlflow.db"
    patch = pytest.MonkeyPatch()
    patch.setenv("MLFLOW_TRACKING_URI", uri)
    patch.setenv("TWINPATH_CACHE", str(folder / "cache"))
    patch.chdir(folder)
    for seed, wrong in ((1, None), (2, None), (3, 5)):
        register(uri, seed=seed, wrong_for=wrong)
    found = Registry(uri, timeout_s=30)
    found.set_alias(MODEL, "champion", "1")
    # Graphs are imported anew, with the registry that is named now.
    patch.delitem(sys.modules, "rollout_graphs", raising=False)
    path = os.pathsep.join([str(ROOT / "platform"), str(ROOT), str(HERE)])
    ray.init(
        address="local", num_cpus=8, include_dashboard=False, log_to_driver=False,
        logging_level="error",
        runtime_env={"env_vars": {"PYTHONPATH": path, "MLFLOW_TRACKING_URI": uri}},
    )  # fmt: skip
    yield found
    ray.shutdown()
    found.close()
    patch.undo()
    sys.modules.pop("rollout_graphs", None)


@pytest.fixture(scope="module")
def data(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Flights with what became of them, and one row that the graph refuses."""
    x = rows(8000, seed=9)
    frame = pd.DataFrame(
        {
            "carrier": [CARRIERS[int(code)] for code in x["carrier_code"]],
            "hour": x["hour"],
            "distance": x["distance"],
            "late": truth(x, seed=10).astype(float),
        }
    )
    frame.loc[0, "hour"] = -1.0
    frame.loc[1:100, "late"] = np.nan
    path = tmp_path_factory.mktemp("data") / "flights.parquet"
    frame.to_parquet(path)
    return path


@pytest.fixture
def run(registry: Registry, tmp_path: Path) -> Run:
    def command(*words: str) -> Result:
        return CliRunner().invoke(app, ["rollout", *words], env={"COLUMNS": "160"})

    return command


def report(result: Result) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def backtest(run: Run, data: Path, folder: Path, challenger: str, *more: str) -> Result:
    return run(
        "backtest", GRAPH, "--data", str(data), "--challenger", challenger,
        "--segment", "carrier", "--label", "late", "-o", str(folder), *more,
    )  # fmt: skip


def test_a_good_challenger_passes_its_backtest_and_the_report_is_kept(
    run: Run, registry: Registry, data: Path, tmp_path: Path
):
    found = report(backtest(run, data, tmp_path / "good", "2", "--json"))
    assert (found["passed"], found["reasons"], found["rows"]) == (True, [], 7999)
    figures = {each["figure"] for each in found["differences"]}
    assert {"AUC", "accuracy", "calibration error", "score PSI", "error rate"} <= figures
    assert {e["segment"] for e in found["differences"]} >= {f"carrier={c}" for c in CARRIERS}
    assert (tmp_path / "good" / "backtest.png").read_bytes().startswith(b"\x89PNG")
    assert found["kept"].startswith("runs:/")
    assert "twinpath.gate.backtest" in registry.version(MODEL, "2").tags


def test_one_that_is_wrong_for_a_carrier_fails_it_by_that_name(
    run: Run, data: Path, tmp_path: Path
):
    result = backtest(run, data, tmp_path / "wrong", "3")
    assert result.exit_code == 1
    assert "failed" in result.stdout
    assert "carrier=WN" in result.stdout


def test_a_load_test_times_both_versions(run: Run, data: Path, tmp_path: Path):
    found = report(
        run(
            "loadtest",
            GRAPH,
            "--data",
            str(data),
            "--challenger",
            "2",
            "--seconds",
            "2",
            "--ratio",
            "1000",
            "-o",
            str(tmp_path),
            "--json",
        )
    )
    assert found["passed"], found
    for version in ("incumbent", "challenger"):
        one = found[version]
        assert one["requests"] > 20
        assert 0 < one["p50_ms"] <= one["p99_ms"]
        assert (one["failed"], one["rows_per_s"] > 0) == (0, True)


def test_a_rollout_starts_once_its_reports_are_there_and_ends_as_told(
    run: Run, registry: Registry, data: Path, tmp_path: Path
):
    registry.set_tag(MODEL, REQUIRE_TAG, json.dumps(["backtest", "loadtest"]))
    refused = run("start", MODEL, "3")
    assert isinstance(refused.exception, RolloutError)
    assert "did not pass its backtest" in str(refused.exception)
    started = run("start", MODEL, "2", "--steps", "0.1,1", "--key", "carrier", "--json")
    assert report(started)["rollout"]["steps"] == [0.1, 1.0]
    shown = run("status", MODEL)
    for text in ("version 1 → 2", "running", "steps 10% → 100%", "backtest passed"):
        assert text in shown.stdout
    for command, status in (("pause", "paused"), ("resume", "running"), ("promote", "promoted")):
        result = run(command, MODEL, "--reason", f"to {command}", "--json")
        assert report(result)["rollout"]["status"] == status
    assert registry.state(MODEL).aliases["champion"] == "2"
    late = run("abort", MODEL)
    assert isinstance(late.exception, RolloutError)
    history = run("history", MODEL).stdout
    for text in ("started", "paused", "to pause", "resumed", "promote: decided", "promoted"):
        assert text in history
    lines = json.loads(run("history", MODEL, "--json").stdout)["history"]
    assert len(lines) == 5
    assert all(line["by"] for line in lines)


@pytest.mark.parametrize(
    ("words", "error", "says"),
    [
        (("--segment", "carier"), BatchJobError, "Did you mean 'carrier'"),
        (("--model", "dealy"), ConfigError, "Did you mean 'delay'"),
        (("--threshold", "psy=1"), ConfigError, "psy"),
    ],
)
def test_a_typo_is_named(
    run: Run, data: Path, tmp_path: Path, words: tuple[str, ...], error: type, says: str
):
    result = backtest(run, data, tmp_path, "2", *words)
    assert isinstance(result.exception, error), result.output
    assert says in str(result.exception)
