"""What the benchmarks report; the measurements themselves are run by hand."""

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from benchmarks import report, wrk
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


@pytest.mark.slow
def test_the_list_names_what_can_be_run():
    pytest.importorskip("ray")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "list"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    named = {line.split()[0] for line in done.stdout.splitlines()}
    written = {
        path.stem
        for path in (ROOT / "benchmarks").glob("*.py")
        if re.search(r"^def run\(", path.read_text(), re.MULTILINE)
    }
    assert named == written | {"online"}


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")))
def test_the_results_that_are_kept_have_the_promised_form(path: Path):
    found = json.loads(path.read_text())
    assert found["name"] == path.stem
    for row in found["rows"]:
        assert set(row) == KEYS
        assert row["ratio"] == pytest.approx(row["ours"] / row["peer"])


def test_the_load_tool_asks_with_bodies_that_are_no_text(tmp_path: Path):
    text = wrk.script([b"\x00]==]", b"\n"], {"X-Length": "3"}, tmp_path / "bodies")
    assert "local sizes = {5, 1}" in text
    assert 'wrk.headers["X-Length"] = "3"' in text
    assert str(tmp_path / "bodies") in text


@pytest.mark.parametrize("rows", [1, 64])
def test_binary_tensors_are_a_json_header_and_raw_numbers(rows: int):
    from benchmarks.online.forms import FORMS

    x = np.arange(rows * 3, dtype=np.float64).reshape(rows, 3)
    body, headers = FORMS["oip-binary"].encode(x)
    length = int(headers["Inference-Header-Content-Length"])
    [tensor] = json.loads(body[:length])["inputs"]
    assert (tensor["shape"], tensor["parameters"]) == ([rows, 3], {"binary_data_size": rows * 12})
    assert np.array_equal(np.frombuffer(body[length:], "<f4"), x.ravel())
    answer = json.dumps({"outputs": [{"name": "y", "shape": [rows, 3]}]}).encode()
    sized = {"Inference-Header-Content-Length": str(len(answer))}
    assert np.array_equal(FORMS["oip-binary"].decode(sized, answer + body[length:]), x)


@pytest.mark.parametrize(
    ("form", "answer"),
    [
        ("oip", {"outputs": [{"name": "y", "shape": [2, 1], "data": [0.5, 1]}]}),
        ("plain", {"y": [[0.5], [1]]}),
        ("bentoml", [[0.5], [1]]),
        ("mlflow", {"predictions": [[0.5], [1]]}),
    ],
)
def test_every_form_of_an_answer_is_read_as_the_same_numbers(form: str, answer: object):
    from benchmarks.online.forms import FORMS

    body = json.dumps(answer).encode()
    assert FORMS[form].decode({}, body).tolist() == [[0.5], [1]]


def _measured():
    figures = pytest.importorskip("benchmarks.online.figures", exc_type=ImportError)
    found = figures.Measured()
    for server, speed in (("twinpath", 9000), ("triton", 8000), ("litserve", 1000), ("serve", 500)):
        for connections in (32, 128):
            for per_s in (speed - 1, speed, speed + 1000):
                found.add("tabular", server, connections, wrk.Load(per_s, 3.0, 9.0, 0))
    found.failures["bentoml", "tabular"] = "the server ended: 1"
    return figures, found


def test_the_online_benchmark_takes_medians_and_sets_the_targets_that_were_named():
    figures, found = _measured()
    aimed = {(r.unit, r.peer_name): (r.ratio, r.met) for r in figures.rows(found) if r.target}
    assert aimed == {
        ("req/s", "Triton 2.51"): (9000 / 8000, True),
        ("ms (p99)", "Triton 2.51"): (1, True),
        ("req/s", "stock Ray Serve 2.60"): (18, True),
        ("req/s", "best Python peer (LitServe 0.2.19)"): (9, True),
        ("req/s", "Twinpath at 32"): (1, True),
    }


def test_a_server_that_failed_stands_in_the_table_and_in_the_document():
    figures, found = _measured()
    text = figures.markdown(found, figures.rows(found))
    assert "| BentoML 1.4.39 | failed | failed |" in text
    assert "- BentoML 1.4.39, tabular: `the server ended: 1`" in text
    assert figures.notes(found, 4)["failures"] == [
        {"server": "BentoML 1.4.39", "model": "tabular", "reason": "the server ended: 1"}
    ]


def test_a_part_takes_its_place_in_the_kept_result_and_is_never_compared_with_an_older_run():
    figures, kept = _measured()
    document = json.loads(json.dumps(figures.notes(kept, 2)))
    part = figures.Measured()
    for server in ("twinpath", "triton"):
        for _ in range(5):
            part.add("tabular", server, 32, wrk.Load(100, 3.0, 9.0, 0))
    part.fill_from(figures.Measured.from_document(document))
    cells = {(server, c): len(loads) for (_, server, c), loads in part.loads.items()}
    assert cells == {
        ("twinpath", 32): 5, ("triton", 32): 5,
        **{(server, 128): 3 for server in ("twinpath", "triton", "litserve", "serve")},
    }  # fmt: skip
    assert part.rounds() == "3 to 5"
    assert "| LitServe 0.2.19 | – | 1,000 (3 / 9) |" in figures.markdown(part, [])


def test_a_server_that_breaks_in_a_round_is_started_anew(monkeypatch, tmp_path: Path):
    bench = pytest.importorskip("benchmarks.online.bench", exc_type=ImportError)
    starts = []

    @contextlib.contextmanager
    def serve(model: str, folder: Path):
        starts.append(model)
        yield SimpleNamespace(
            url=f"http://{len(starts)}", pause=lambda: None, resume=lambda: None, processes=list
        )

    def load(url: str, bodies: object, connections: int, seconds: int, headers: object):
        if url.endswith("1") and connections == 32:
            raise ConnectionError("it is gone")
        return wrk.Load(100, 1.0, 2.0, 0)

    monkeypatch.setattr(bench, "SERVERS", {"x": bench.Server("X", serve, "oip")})
    monkeypatch.setattr(bench.models, "train", lambda folder: None)
    monkeypatch.setattr(bench, "check", lambda *args: None)
    monkeypatch.setattr(bench, "load", load)
    monkeypatch.setattr(bench, "_IDLE_S", 0.01)
    monkeypatch.setattr(bench.os, "environ", {})
    monkeypatch.setenv("BENCHMARK_PEERS", str(tmp_path))
    found = bench.run(3, Console(quiet=True), bench.Choice(("echo",), ("x",), (32,), 1))
    assert starts == ["echo", "echo"]
    assert found.failures == {}
    assert len(found.loads["echo", "x", 32]) == 2, "the round in which it broke is missing"


@pytest.mark.slow
def test_a_server_that_does_not_start_is_tried_twice_and_noted(monkeypatch, tmp_path: Path):
    bench = pytest.importorskip("benchmarks.online.bench", exc_type=ImportError)
    tries = []

    def serve(model: str, folder: Path):
        tries.append(model)
        raise bench.PeerError("no such wheel")

    monkeypatch.setattr(bench, "SERVERS", {"x": bench.Server("X", serve, "oip")})
    monkeypatch.setattr(bench.models, "train", lambda folder: None)
    monkeypatch.setattr(bench.os, "environ", {})
    monkeypatch.setenv("BENCHMARK_PEERS", str(tmp_path))
    choice = bench.Choice(("echo",), ("x",), (1,), 1)
    found = bench.run(3, Console(quiet=True), choice)
    assert found.failures == {("x", "echo"): "no such wheel"}
    assert tries == ["echo", "echo"]


def test_bad_answers_stand_in_the_table():
    figures, found = _measured()
    found.add("tabular", "triton", 32, wrk.Load(8000, 3.0, 9.0, 7))
    assert ", 7 bad |" in figures.markdown(found, [])


def test_every_peer_with_an_environment_has_every_package_pinned():
    for pins in sorted((ROOT / "benchmarks" / "online" / "peers").glob("*.txt")):
        lines = [line for line in pins.read_text().splitlines() if not line.startswith("#")]
        assert lines
        assert all(line.count("==") == 1 for line in lines), pins.name
