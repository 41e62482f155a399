"""The whole path on real flights: train, serve, send requests, score a batch, compare.

``python -m graphs.demo [--exit]`` keeps serving until Ctrl-C, or with ``--exit`` ends at once.
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import polars as pl
from rich.console import Console
from rich.table import Table

from graphs.flights_model.data import asked_at
from graphs.flights_model.schema import DIRECTORY_VARIABLE, flights_dir
from graphs.flights_model.store import MOMENT
from graphs.flights_model.train import ensure
from twinpath.online.session import ServeSession, interrupt_once

ROOT = Path(__file__).resolve().parent.parent
ROWS = 2000
ROWS_A_REQUEST = 50
CONNECTIONS = 32
LOAD_S = 5.0
PATH = "/flights/predict"


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--exit", action="store_true", help="end after the comparison")
    parser.add_argument("--port", type=int, default=8000, help="HTTP port (default 8000)")
    given = parser.parse_args()
    interrupt_once()
    console = Console()
    try:
        run(console, given.port, given.exit)
    except KeyboardInterrupt:
        console.print("\nStopped.")


def run(console: Console, port: int, leave: bool) -> None:
    """All steps; `leave` ends the session at the end instead of waiting for Ctrl-C."""
    folder = flights_dir()
    with step(
        console, "Preparing data, features, online store and model (the first time a minute)"
    ):
        metrics = ensure(folder)
    show_quality(console, metrics)
    session = ServeSession(
        num_cpus=4,
        http_port=port,
        pythonpath=[ROOT / "platform", ROOT],
        env={DIRECTORY_VARIABLE: str(folder)},
    )
    console.print(f"[dim]Logs of this run: {session.folder}[/]")
    with step(console, "Starting Ray and Serve behind HAProxy"):
        session.__enter__()
    try:
        with step(console, "serve deploy deployments/flights.yaml"):
            session.deploy(ROOT / "deployments" / "flights.yaml")
            session.wait_until_ready()
        requests = read_requests(folder)
        with step(
            console, f"Asking for {ROWS:,} real flights after {MOMENT:%d %B, %H:%M} UTC over HTTP"
        ):
            online = ask(session.url, requests)
        show_answers(console, requests, online)
        with (
            tempfile.TemporaryDirectory() as scratch,
            step(console, "ray job submit -- python batch/score_flights.py"),
        ):
            offline = score(session, Path(scratch) / "scored", folder)
        compare(console, requests, online, offline)
        with step(
            console, f"Load for {LOAD_S:g} s at {CONNECTIONS} connections, one row a request"
        ):
            rate, p50_ms, p99_ms = asyncio.run(load(session.url, requests))
        console.print(f"  {rate:,.0f} requests/s, p50 {p50_ms:.1f} ms, p99 {p99_ms:.1f} ms")
        console.print("  [dim](client and server share this machine's cores)[/]")
        show_addresses(console, session, requests[0])
        if not leave:
            console.print("\nServing. [bold]Ctrl-C[/] stops everything.")
            signal.pause()
    finally:
        with step(console, "Stopping Ray, HAProxy and replicas"):
            session.stop()
        left = session.processes()
        if left:
            raise SystemExit(f"still running: {', '.join(map(str, left))}")
        console.print("Nothing is left running.")


@contextmanager
def step(console: Console, text: str) -> Iterator[None]:
    """A line with a spinner while the work goes on, and the time it took."""
    started = time.perf_counter()
    with console.status(text + " …"):
        yield
    console.print(f"[green]✓[/] {text} [dim]{time.perf_counter() - started:.1f} s[/]")


def read_requests(folder: Path) -> list[dict[str, Any]]:
    """The next ROWS flights after the online store's moment as JSON rows, with their
    ``flight_id``, each asked for at that moment."""
    month = pl.read_parquet(folder / "data" / "requests" / f"2013-{MOMENT.month:02d}.parquet")
    rows = asked_at(month, MOMENT).head(ROWS).to_dicts()
    for row in rows:
        for moment in ("scheduled_departure", "asked_at"):
            row[moment] = row[moment].isoformat()
    return rows


def body_of(rows: list[dict[str, Any]]) -> bytes:
    """A request's body; ``flight_id`` is ours and not part of the graph's input."""
    return json.dumps(
        {"rows": [{k: v for k, v in row.items() if k != "flight_id"} for row in rows]}
    ).encode()


def ask(url: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The served graph's answers, in order."""
    answers: list[dict[str, Any]] = []
    for start in range(0, len(rows), ROWS_A_REQUEST):
        request = urllib.request.Request(
            url + PATH,
            data=body_of(rows[start : start + ROWS_A_REQUEST]),
            headers={"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            answers += json.load(answer)["rows"]
    return answers


def score(session: ServeSession, sink: Path, folder: Path) -> pl.DataFrame:
    """The batch job's predictions for the same flights, through `ray job submit`."""
    runtime_env = {
        "env_vars": {
            DIRECTORY_VARIABLE: str(folder),
            "PYTHONPATH": os.pathsep.join([str(ROOT / "platform"), str(ROOT)]),
        }
    }
    session.command(
        "ray", "job", "submit", f"--address={session.dashboard_url}",
        f"--runtime-env-json={json.dumps(runtime_env)}", "--",
        "python", str(ROOT / "batch" / "score_flights.py"), f"--month={MOMENT.month}",
        f"--asked-at={MOMENT:%Y-%m-%dT%H:%M}", f"--rows={ROWS}", f"--out={sink}", "--workers=1",
        timeout_s=300,
    )  # fmt: skip
    return pl.read_parquet(sink / "*.parquet")


def compare(
    console: Console,
    requests: list[dict[str, Any]],
    online: list[dict[str, Any]],
    offline: pl.DataFrame,
) -> None:
    """Print how far both runtimes agree. Raises SystemExit when they do not."""
    served = pl.DataFrame(online).with_columns(
        pl.Series("flight_id", [row["flight_id"] for row in requests])
    )
    both = served.join(offline, on="flight_id", suffix="_offline")
    if both.height != len(requests):
        raise SystemExit(f"{both.height} of {len(requests)} flights were answered by both paths")
    difference = float(np.abs(both["p_delay"] - both["p_delay_offline"]).max())
    same = both.filter(
        (pl.col("delayed") == pl.col("delayed_offline"))
        & (pl.col("reason") == pl.col("reason_offline"))
    ).height
    console.print(
        f"  online and offline agree on {both.height:,} real rows: max |difference| of p_delay "
        f"[bold]{difference:.3g}[/], {same:,} with the same verdict and reason"
    )
    if difference > 1e-9 or same != both.height:
        raise SystemExit("the two paths disagree")


async def load(url: str, rows: list[dict[str, Any]]) -> tuple[float, float, float]:
    """Requests/s, p50 and p99 in milliseconds of a closed loop of one-row requests."""
    bodies = [body_of([row]) for row in rows[:500]]
    times_s: list[float] = []
    end_s = time.perf_counter() + LOAD_S

    async def worker(session: aiohttp.ClientSession, number: int) -> None:
        while (started := time.perf_counter()) < end_s:
            body = bodies[(number + len(times_s)) % len(bodies)]
            async with session.post(url + PATH, data=body, headers=_JSON) as answer:
                await answer.read()
                answer.raise_for_status()
            times_s.append(time.perf_counter() - started)

    connector = aiohttp.TCPConnector(limit=CONNECTIONS)
    async with aiohttp.ClientSession(connector=connector) as session:
        await asyncio.gather(*(worker(session, i) for i in range(CONNECTIONS)))
    cuts = statistics.quantiles(times_s, n=100)
    return len(times_s) / LOAD_S, cuts[49] * 1000, cuts[98] * 1000


_JSON = {"content-type": "application/json"}


def show_quality(console: Console, metrics: dict[str, Any]) -> None:
    """Print the model against its baseline."""
    console.print(
        f"  AUC on October to December: model [bold]{metrics['auc']:.3f}[/], "
        f"carrier-and-hour baseline {metrics['auc_baseline']:.3f} "
        "(trained on January to September)"
    )


def show_answers(
    console: Console, rows: list[dict[str, Any]], answers: list[dict[str, Any]]
) -> None:
    """Print three flights that say something: the least, the middle and the most likely late."""
    table = Table("flight", "scheduled (UTC)", "p(late)", "late?", "reason")
    order = sorted(range(len(answers)), key=lambda i: float(answers[i]["p_delay"]))
    for i in (order[0], order[len(order) // 2], order[-1]):
        row, answer = rows[i], answers[i]
        table.add_row(
            f"{row['carrier']}{row['flight']} {row['origin']}→{row['dest']}",
            row["scheduled_departure"][:16],
            f"{answer['p_delay']:.2f}",
            "yes" if answer["delayed"] else "no",
            answer["reason"],
        )
    console.print(table)


def show_addresses(console: Console, session: ServeSession, row: dict[str, Any]) -> None:
    """Print where it serves and a request to paste."""
    console.print(f"\n  predict    POST {session.url}{PATH}")
    console.print(f"  API page   {session.url}/docs")
    console.print(f"  readiness  {session.url}/readyz")
    console.print(f"  Ray        {session.dashboard_url} [dim](token {session.marker})[/]\n")
    body = body_of([row]).decode()
    console.print(
        f"  curl {session.url}{PATH} -H 'content-type: application/json' -d '{body}'",
        soft_wrap=True,
        highlight=False,
    )


if __name__ == "__main__":
    main()
