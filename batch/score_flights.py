"""Score one month of flights.

`ray job submit --working-dir . -- python batch/score_flights.py --month 12 --out …`

Needs the prepared example: `python -m graphs.flights_model.train`.
"""

import argparse
import tempfile
from datetime import datetime
from pathlib import Path

import polars as pl

from graphs.flights import data_dir, graph
from graphs.flights_model.data import asked_at


def main() -> None:
    """Score the month's requests to Parquet; print rows, rows/s and dead letters."""
    parser = argparse.ArgumentParser(description="Score one month of 2013 to Parquet.")
    parser.add_argument("--month", type=int, choices=range(1, 13), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for the predictions")
    parser.add_argument("--rows", type=int, help="score only the first rows of the month")
    parser.add_argument(
        "--asked-at",
        type=datetime.fromisoformat,
        help="score flights that depart after this moment (UTC), with what was known at it",
    )
    parser.add_argument("--workers", type=int, help="actors (default: the CPUs that are free)")
    given = parser.parse_args()
    source = Path(data_dir) / "data" / "requests" / f"2013-{given.month:02d}.parquet"
    with tempfile.TemporaryDirectory() as scratch:
        if given.rows is not None or given.asked_at is not None:
            head = Path(scratch) / source.name
            requests = pl.read_parquet(source)
            if given.asked_at is not None:
                requests = asked_at(requests, given.asked_at)
            requests.head(given.rows or requests.height).write_parquet(head)
            source = head
        job = graph.job(str(source), str(given.out), keep=["flight_id"], workers=given.workers)
        done = job.run()
    print(f"{done.rows} rows, {done.rows_per_s:,.0f} rows/s, {done.dead_letters} dead letters")


if __name__ == "__main__":
    main()
