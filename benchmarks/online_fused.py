"""A fused graph of four nodes against the same classes composed the stock way on Ray Serve.

Each round starts one, loads it at 1, 8 and 32 connections, stops it, and does the same with the
other. Both run on their own Ray with the same number of CPUs; the stock way with Serve's defaults.
"""

import json
import urllib.request
from pathlib import Path
from statistics import median

from rich.console import Console

from benchmarks.report import Row
from benchmarks.wrk import Load, load
from graphs.demo import body_of, read_requests
from graphs.flights_model.schema import DIRECTORY_VARIABLE, flights_dir
from graphs.flights_model.train import ensure
from twinpath.online.session import ServeSession

ROOT = Path(__file__).resolve().parent.parent
CONNECTIONS = (1, 8, 32)
DURATION_S = 6.0
WARM_UP_S = 2.0
PEER = "stock Serve, 4 deployments"


def run(rounds: int, console: Console) -> list[Row]:
    """Median figures of alternated rounds. Raises SystemExit when the two ways disagree."""
    ensure(flights_dir())
    bodies = [body_of([row]) for row in read_requests(flights_dir())[:200]]
    seen: dict[bool, dict[int, list[Load]]] = {
        ours: {connections: [] for connections in CONNECTIONS} for ours in (True, False)
    }
    answers: dict[bool, list[object]] = {}
    for number in range(rounds):
        for ours in (True, False) if number % 2 == 0 else (False, True):
            name = "fused graph" if ours else PEER
            with console.status(f"round {number + 1} of {rounds}: {name}"):
                answers[ours] = _measure(ours, bodies, seen[ours])
    if answers[True] != answers[False]:
        raise SystemExit("the two ways gave different answers, so their speed says nothing")
    rows = []
    for connections in CONNECTIONS:
        at = f"{connections} connection{'s' if connections > 1 else ''}"
        last = connections == CONNECTIONS[-1]
        mine, theirs = seen[True][connections], seen[False][connections]
        for metric, unit, target in (
            ("per_s", "req/s", ">= 5"),
            ("p50_ms", "ms (p50)", "< 1"),
            ("p99_ms", "ms (p99)", "< 1"),
        ):
            values = [median(getattr(result, metric) for result in way) for way in (mine, theirs)]
            rows.append(Row(at, unit, *values, PEER, target if last else None))
    return rows


def _measure(ours: bool, bodies: list[bytes], into: dict[int, list[Load]]) -> list[object]:
    """One session: answers to the first bodies, then the loads."""
    with ServeSession(
        num_cpus=8,
        fast_path=ours,
        pythonpath=[ROOT / "platform", ROOT],
        env={DIRECTORY_VARIABLE: str(flights_dir())},
    ) as session:
        config = session.folder / "app.yaml"
        target = "app" if ours else "stock"
        config.write_text(
            "applications:\n- name: bench\n  route_prefix: /fused\n"
            f"  import_path: benchmarks.fused_graph:{target}\n"
        )
        session.deploy(config)
        url = session.url + "/fused/predict"
        answers = [_post(url, body) for body in bodies[:20]]
        load(url, bodies, 8, WARM_UP_S)
        for connections, results in into.items():
            result = load(url, bodies, connections, DURATION_S)
            if result.bad:
                raise SystemExit(f"{result.bad} requests failed at {connections} connections")
            results.append(result)
    return answers


def _post(url: str, body: bytes) -> object:
    request = urllib.request.Request(url, data=body, headers={"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)["rows"]
