"""All flights of 2013 through the graph on Ray Data, against a plain loop over the same nodes.

Both read the year's Parquet and write Parquet. The plain loop is one process with one thread, and
its nodes are set up before the clock starts. The job has two workers on a Ray of two CPUs that
has run a job before. "One job" counts the start of the job's actors, which are new processes that
import and load the models; "each further year" leaves that out: (time of a job over YEARS years
minus time of a job over one) / (YEARS - 1), where the latter is the mean of one job before and
one after the long one.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

from rich.console import Console

from benchmarks.report import Row
from graphs.flights_model.schema import flights_dir
from graphs.flights_model.train import ensure

ROOT = Path(__file__).resolve().parent.parent
WORKERS = 2
BATCH_SIZE = 8192
YEARS = 8
PEER = "plain loop, 1 core"


def run(rounds: int, console: Console) -> list[Row]:
    """Median figures of alternated rounds."""
    ensure(flights_dir())
    seen: dict[str, list[dict[str, Any]]] = {"plain": [], "job": []}
    for number in range(rounds):
        for way in ("plain", "job") if number % 2 == 0 else ("job", "plain"):
            with console.status(f"round {number + 1} of {rounds}: {way}"):
                seen[way].append(_in_process(way))
    rows = {way: {result["rows"] for result in results} for way, results in seen.items()}
    if rows["plain"] != rows["job"]:
        raise SystemExit(f"the two ways scored different numbers of rows: {rows}")
    plain = median(r["rows"] / r["wall_s"] for r in seen["plain"])
    one = median(r["rows"] / r["wall_s"] for r in seen["job"])
    further = median(r["rows"] / r["further_wall_s"] for r in seen["job"])
    return [
        Row("2013 in one job, with its start", "rows/s", one, plain, PEER, ">= 1.2"),
        Row("each further year", "rows/s", further, plain, PEER, ">= 1.2"),
        Row("each further year, per core", "rows/s", further / WORKERS, plain, PEER, ">= 0.8"),
        Row(
            "2013 in one job, with its start", "seconds",
            *(median(r["wall_s"] for r in seen[way]) for way in ("job", "plain")), PEER,
        ),
    ]  # fmt: skip


def _in_process(way: str) -> dict[str, Any]:
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "POLARS_MAX_THREADS"), "1")
    path = os.pathsep.join([str(ROOT / "platform"), str(ROOT)])
    env = os.environ | threads | {"PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0"}
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as sink:
            subprocess.run(
                [sys.executable, "-m", "benchmarks.offline_flights", way, folder],
                env=env, cwd=ROOT, stdout=sink, stderr=subprocess.STDOUT, timeout=600, check=True,
            )  # fmt: skip
        found: dict[str, Any] = json.loads(log.read_text().split("RESULT ")[1].splitlines()[0])
    return found


def _source() -> Path:
    return flights_dir() / "data" / "requests"


def _plain(folder: Path) -> dict[str, Any]:
    """The same nodes, called one after the other on batches; the branch by a mask."""
    import polars as pl

    from graphs.flights import graph
    from graphs.flights_model.train import request_columns

    nodes = {step.name: step.node for step in graph.plan.offline().steps}
    for node in nodes.values():
        node.setup()
    low, high = _close_call()
    started = time.perf_counter()
    table = pl.read_parquet(_source() / "*.parquet")
    outputs = []
    for start in range(0, table.height, BATCH_SIZE):
        part = table.slice(start, BATCH_SIZE)
        columns = request_columns(part)
        for name in ("preprocess", "feature_lookup", "delay_model"):
            columns |= nodes[name].predict(columns)
        close = (columns["p_delay"] >= low) & (columns["p_delay"] <= high)
        second = nodes["second_opinion"].predict({k: v[close] for k, v in columns.items()})
        for name, values in second.items():
            whole = columns.get(name)
            if whole is None:
                whole = values[:0].copy()
                whole.resize(len(close), refcheck=False)
            columns[name] = whole.copy()
            columns[name][close] = values
        columns |= nodes["decide"].predict(columns)
        names = graph.output_schema.fields
        outputs.append(
            pl.DataFrame({"flight_id": part["flight_id"], **{n: columns[n] for n in names}})
        )
    scored = pl.concat(outputs)
    scored.write_parquet(folder / "scored.parquet")
    return {"rows": scored.height, "wall_s": time.perf_counter() - started}


def _close_call() -> tuple[float, float]:
    from graphs.flights_model.nodes import CLOSE_CALL

    return CLOSE_CALL


def _job(folder: Path) -> dict[str, Any]:
    import ray

    from graphs.flights import graph

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        graph.job(_source() / "2013-01.parquet", folder / "warm-up", **_OPTIONS).run()
        one = [graph.job(_source(), folder / "one", **_OPTIONS).run()]
        several = folder / "several-years"
        several.mkdir()
        for year in range(YEARS):
            for file in _source().glob("*.parquet"):
                (several / f"{year}-{file.name}").symlink_to(file)
        more = graph.job(several, folder / "more", **_OPTIONS).run()
        one.append(graph.job(_source(), folder / "again", **_OPTIONS).run())
    finally:
        ray.shutdown()
    rows = one[0].rows + one[0].dead_letters
    if more.rows + more.dead_letters != YEARS * rows:
        raise SystemExit(f"{more.rows} rows were scored, expected {YEARS * rows}")
    wall_s = mean(job.duration_s for job in one)
    further_wall_s = (more.duration_s - wall_s) / (YEARS - 1)
    return {"rows": rows, "wall_s": wall_s, "further_wall_s": further_wall_s}


_OPTIONS: dict[str, Any] = {"keep": ["flight_id"], "workers": WORKERS, "batch_size": BATCH_SIZE}


if __name__ == "__main__":
    ways = {"plain": _plain, "job": _job}
    print("RESULT " + json.dumps(ways[sys.argv[1]](Path(sys.argv[2]))))
