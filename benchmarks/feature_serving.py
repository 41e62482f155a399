"""The flights graph with features looked up, against the same graph with them held in memory.

All are served by one Serve and loaded in turns at 32 connections, one row a request, so that the
machine's drift cancels.
"""

import os
import tempfile
from pathlib import Path
from statistics import median

from rich.console import Console

from benchmarks.feature_graphs import REDIS_VARIABLE
from benchmarks.feature_lookup import redis_server
from benchmarks.report import Row
from benchmarks.side_by_side import loads
from benchmarks.wrk import Load
from graphs.demo import body_of, read_requests
from graphs.flights_model import store
from graphs.flights_model.schema import DIRECTORY_VARIABLE, flights_dir
from graphs.flights_model.train import ensure
from twinpath.online.session import ServeSession

ROOT = Path(__file__).resolve().parent.parent
CONNECTIONS = 32
SECONDS = 4
WAYS = ("held", "redis", "sqlite")
ADDS_MS = 5.0


def run(rounds: int, console: Console) -> list[Row]:
    """Median figures of alternated rounds. Raises SystemExit when a request fails."""
    ensure(flights_dir())
    bodies = [body_of([row]) for row in read_requests(flights_dir())]
    with tempfile.TemporaryDirectory(prefix="features-") as scratch, redis_server(scratch) as redis:
        folder = Path(scratch) / "flights"
        folder.mkdir()
        (folder / "features").symlink_to(flights_dir() / "features")
        os.environ[store.REDIS_VARIABLE] = redis.address
        try:
            store.make_repository(folder)
            store.materialise(folder)
            seen = _served(folder, redis.address, bodies, rounds, console)
        finally:
            del os.environ[store.REDIS_VARIABLE]
    figures = {
        way: {
            figure: median(getattr(one, figure) for one in results)
            for figure in ("per_s", "p50_ms", "p99_ms")
        }
        for way, results in seen.items()
    }
    rows = []
    for way, title in (("redis", "Redis"), ("sqlite", "SQLite")):
        ours, plain = figures[way], figures["held"]
        adds_ms = max(ours["p99_ms"] - plain["p99_ms"], 0.0)
        rows += [
            Row(f"{title}, adds", "ms (p99)", adds_ms, ADDS_MS, "limit", "< 1"),
            Row(title, "ms (p99)", ours["p99_ms"], plain["p99_ms"], "held in memory"),
            Row(title, "ms (p50)", ours["p50_ms"], plain["p50_ms"], "held in memory"),
            Row(title, "req/s", ours["per_s"], plain["per_s"], "held in memory"),
        ]
    return rows


def _served(
    folder: Path, address: str, bodies: list[bytes], rounds: int, console: Console
) -> dict[str, list[Load]]:
    env = {
        DIRECTORY_VARIABLE: str(flights_dir()),
        REDIS_VARIABLE: str(folder),
        store.REDIS_VARIABLE: address,
    }
    with ServeSession(num_cpus=8, pythonpath=[ROOT / "platform", ROOT], env=env) as session:
        return loads(
            session,
            {way: {"import_path": f"benchmarks.feature_graphs:{way}"} for way in WAYS},
            {way: f"/{way}/predict" for way in WAYS},
            bodies, rounds, console, connections=CONNECTIONS, seconds=SECONDS,
        )  # fmt: skip
