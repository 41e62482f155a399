"""What the benchmarks report; the measurements themselves are run by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import report
from benchmarks.report import Row, publish

ROOT = Path(__file__).resolve().parents[2]
KEYS = {"metric", "unit", "ours", "peer", "peer_name", "ratio", "target", "met"}


@pytest.mark.parametrize(
    ("target", "ours", "met"),
    [
        (">= 5", 50, True),
        (">= 5", 49, False),
        ("< 1", 9, True),
        ("< 1", 10, False),
        (None, 1, None),
    ],
)
def test_a_target_is_about_the_ratio(target: str | None, ours: float, met: bool | None):
    row = Row("32 connections", "req/s", ours, 10, "stock", target)
    assert row.ratio == ours / 10
    assert row.met is met


def test_a_target_that_cannot_be_read_is_refused():
    with pytest.raises(ValueError, match="expected an operator and a number"):
        Row("a", "req/s", 1, 1, "stock", "fast").as_dict()


def test_a_result_is_a_table_a_json_file_and_a_picture(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    path = publish("quick", [Row("a", "req/s", 12, 4, "stock", ">= 5")], Console(width=120))
    found = json.loads(path.read_text())
    assert set(found) == {"name", "date", "machine", "rows"}
    [row] = found["rows"]
    assert set(row) == KEYS
    assert (row["ratio"], row["met"]) == (3, False)
    assert "no" in capsys.readouterr().out
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_list_names_what_can_be_run():
    pytest.importorskip("ray")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "list"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        "online_fused", "offline_flights",
    ]  # fmt: skip


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")))
def test_the_results_that_are_kept_have_the_promised_form(path: Path):
    found = json.loads(path.read_text())
    assert found["name"] == path.stem
    for row in found["rows"]:
        assert set(row) == KEYS
        assert row["ratio"] == pytest.approx(row["ours"] / row["peer"])
