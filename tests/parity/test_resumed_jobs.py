"""A job that is killed, and run again, on a real Ray Data."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[2]
ROWS, BAD = 400, {13, 77, 250, 399}

#: One attempt, as a process of its own. The node notes which rows it runs.
ATTEMPT = """
import os, sys, time
import numpy as np
import ray
from pydantic import BaseModel
from twinpath import Graph, Node, Batch, Replicas


class Row(BaseModel):
    id: int


class Out(BaseModel):
    twice: int


class Slow(Node):
    inputs = {"id": "int64"}
    outputs = {"twice": "int64"}

    def __init__(self, log, pause_s):
        self.log, self.pause_s = log, pause_s

    def predict(self, columns):
        ids = columns["id"]
        if len(ids) > 1:
            with open(self.log, "a") as file:
                file.write(" ".join(map(str, ids.tolist())) + "\\n")
            time.sleep(self.pause_s)
        if np.isin(ids, (13, 77, 250, 399)).any():
            raise ValueError("bad row")
        return {"twice": ids * 2}


source, sink, log, pause_s = sys.argv[1:]
graph = Graph("slow", input=Row, output=Out)
with graph as row:
    graph.output(Slow(log, float(pause_s))(row))
ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
done = graph.job(source, sink, keep=["id"], workers=2, batch_size=10, resume=True).run()
print("SUMMARY", done.rows, done.dead_letters, done.resumed_rows)
"""


def attempt(tmp_path: Path, log: str, pause_s: float) -> subprocess.Popen:
    script = tmp_path / "attempt.py"
    script.write_text(ATTEMPT)
    path = os.pathsep.join([str(ROOT / "platform"), str(ROOT)])
    arguments = [tmp_path / "rows.parquet", tmp_path / "sink", tmp_path / log, pause_s]
    return subprocess.Popen(
        [sys.executable, str(script), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


def commits(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "sink").glob("run-*/*.parquet"))


def ids(folder: Path) -> list[int]:
    return sorted(pd.read_parquet(folder)["id"].tolist())


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_job_killed_and_run_again_has_every_row_once_and_runs_no_done_row_again(tmp_path):
    pd.DataFrame({"id": range(ROWS)}).to_parquet(tmp_path / "rows.parquet", row_group_size=90)
    first = attempt(tmp_path, "first.log", 0.5)
    try:
        deadline_s = time.monotonic() + 150
        while len(commits(tmp_path)) < 6:
            assert first.poll() is None, first.communicate()[0]
            assert time.monotonic() < deadline_s, "no batch was committed"
            time.sleep(0.05)
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    second = attempt(tmp_path, "second.log", 0.0)
    told, _ = second.communicate(timeout=200)
    assert second.returncode == 0, told
    summary = next(line for line in told.splitlines() if line.startswith("SUMMARY"))
    rows, dead, resumed = map(int, summary.split()[1:])
    assert (rows, dead) == (ROWS - len(BAD), len(BAD))
    assert 60 <= resumed < ROWS

    scored = pd.read_parquet(tmp_path / "sink")
    assert sorted(scored["id"]) == sorted(set(range(ROWS)) - BAD)
    assert (scored["twice"] == scored["id"] * 2).all()
    assert ids(tmp_path / "sink.dead_letters") == sorted(BAD)

    once = {int(word) for word in (tmp_path / "second.log").read_text().split()}
    old = {int(i) for i in ids(tmp_path / "sink" / "run-0001")}
    assert not once & old
    assert len(once) == ROWS - resumed

    third = attempt(tmp_path, "third.log", 0.0)
    told, _ = third.communicate(timeout=200)
    assert f"SUMMARY {ROWS - len(BAD)} {len(BAD)} {ROWS}" in told
    assert not (tmp_path / "third.log").exists()
