"""Point-in-time joins of real flights with feature views, against Feast's own retrieval.

Both read the views' Parquet files anew in each round and answer the same questions: what was known
of a flight's airline, route, number and aircraft an hour before it left. Feast's file store pairs
each question with every row of its key, so it is asked few questions; the whole year is joined by
ours alone. A round fails when the two disagree, or when a row that was planted in the future shows.
"""

import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd
import polars as pl
from rich.console import Console

from benchmarks.report import Row
from graphs.flights_model.data import prepare
from graphs.flights_model.features import SERVICE, build
from graphs.flights_model.preprocess import Preprocess
from graphs.flights_model.schema import flights_dir
from graphs.flights_model.store import make_repository
from graphs.flights_model.train import request_columns
from twinpath.features.history import Sources, as_of_join
from twinpath.features.repo import FeatureRepo
from twinpath.features.spec import ViewSpec
from twinpath.graph.columns import Columns, row_count

VIEWS = ("carrier", "route", "number", "tail")
FEW, MANY = 500, 20_000
ONE_VIEW = "tail"
FEAST = "Feast get_historical_features"
#: A value that no feature has.
PLANTED = 1e9

Joined = dict[str, np.ndarray]


def run(rounds: int, console: Console) -> list[Row]:
    """Median figures of alternated rounds. Raises SystemExit when answers differ or leak."""
    directory = flights_dir()
    with console.status("preparing flights and their features"):
        prepare(directory)
        build(directory)
        repo = FeatureRepo(make_repository(directory))
        questions = _questions(directory)
    views = {view.name: view for view in repo.service(SERVICE).views}
    four = [views[name] for name in VIEWS]
    total = row_count(questions)
    some = _sample(questions, FEW)
    more = _sample(questions, MANY)
    forms: dict[str, tuple[int, Callable[[], Joined], Callable[[], Joined] | None]] = {
        "few": (FEW, lambda: _ours(four, some), lambda: _feast(repo, four, some)),
        "one": (
            MANY,
            lambda: _ours([views[ONE_VIEW]], more),
            lambda: _feast(repo, [views[ONE_VIEW]], more),
        ),
        "year": (total, lambda: _ours(four, questions), None),
    }
    seen: dict[tuple[str, str], list[float]] = {}
    for number in range(rounds):
        for form, (rows, ours, feast) in forms.items():
            ways = [("ours", ours)] + ([("feast", feast)] if feast is not None else [])
            answers = {}
            for way, ask in ways if number % 2 == 0 else reversed(ways):
                with console.status(f"round {number + 1} of {rounds}: {form}, {way}"):
                    began = time.perf_counter()
                    answers[way] = ask()
                    rate = rows / (time.perf_counter() - began)
                seen.setdefault((form, way), []).append(rate)
            if feast is not None:
                _must_agree(answers["ours"], answers["feast"])
    leaks = _leaks(four, questions)
    console.print(f"rows that saw a value from the future: {leaks} of {total:,}")
    if leaks:
        raise SystemExit("the join leaks values from the future")

    def rate(form: str, way: str = "ours") -> float:
        return median(seen[form, way])

    return [
        Row(f"{FEW} rows × {len(four)} views", "rows/s", rate("few"), rate("few", "feast"), FEAST,
            ">= 3"),
        Row(f"{MANY:,} rows × 1 view", "rows/s", rate("one"), rate("one", "feast"), FEAST, ">= 3"),
        Row(f"{total:,} rows × {len(four)} views", "rows/s", rate("year"), rate("few", "feast"),
            f"{FEAST}, {FEW} rows", ">= 3"),
    ]  # fmt: skip


def _questions(directory: Path) -> Columns:
    """Keys and moment of every flight of the year."""
    node = Preprocess(str(directory))
    node.setup()
    columns = request_columns(pl.read_parquet(directory / "data" / "requests" / "*.parquet"))
    columns |= node.predict(columns)
    return {name: columns[name] for name in ("carrier", "route", "number", "tailnum", "as_of")}


def _sample(questions: Columns, rows: int) -> Columns:
    """Flights over the whole year, each with all its keys: Feast has no answer for a null."""
    whole = np.flatnonzero([name is not None for name in questions["tailnum"]])
    chosen = np.sort(np.random.default_rng(0).choice(whole, rows, replace=False))
    return {name: values[chosen] for name, values in questions.items()}


def _ours(views: Sequence[ViewSpec], questions: Columns) -> Joined:
    sources, found = Sources(), {}
    moments = questions["as_of"].astype("datetime64[us]").astype(np.int64)
    for view in views:
        joined = as_of_join(view, questions, moments, sources)
        for name in view.features:
            found[name] = np.where(joined.found, joined.values[name], np.nan)
    return found


def _feast(repo: FeatureRepo, views: Sequence[ViewSpec], questions: Columns) -> Joined:
    keys = list(dict.fromkeys(key for view in views for key in view.entity_keys))
    frame = pd.DataFrame({key: questions[key] for key in keys})
    frame["event_timestamp"] = pd.to_datetime(questions["as_of"], utc=True)
    frame["row"] = np.arange(len(frame))
    wanted = [f"{view.name}:{name}" for view in views for name in view.features]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        answer = repo.store.get_historical_features(frame, wanted).to_df()
    found = {name: answer[name].to_numpy(dtype=float) for name in
             (name for view in views for name in view.features)}  # fmt: skip
    return {"row": answer["row"].to_numpy(), **found}


def _must_agree(ours: Joined, feasts: Joined) -> None:
    """Feast leaves out rows whose key is known and has no value that holds."""
    rows = feasts.pop("row")
    if len(rows) < len(next(iter(ours.values()))) / 4:
        raise SystemExit(f"Feast answered {len(rows)} rows only: too few to compare")
    for name, theirs in feasts.items():
        mine = ours[name][rows].astype(np.float32)
        if not np.array_equal(mine, theirs.astype(np.float32), equal_nan=True):
            different = int((mine != theirs.astype(np.float32)).sum())
            raise SystemExit(f"{name}: {different} of {len(rows)} rows differ from Feast's")


def _leaks(views: Sequence[ViewSpec], questions: Columns) -> int:
    """Rows that change, or get a planted value, when every key has a row right after the last
    moment that is asked about, in sources that are otherwise the same."""
    moments = questions["as_of"].astype("datetime64[us]").astype(np.int64)
    changed = np.zeros(len(moments), dtype=bool)
    with tempfile.TemporaryDirectory() as folder:
        for view in views:
            [key] = view.entity_keys
            path = Path(folder) / f"{view.name}.parquet"
            true = pl.read_parquet(view.source_path)
            # The last moment that is asked about, and a microsecond: in the future of all.
            at = true.schema[view.timestamp_field]
            late = pl.lit(int(moments.max()) + 1).cast(pl.Datetime("us")).cast(at)
            planted = (
                true.filter(pl.col(view.timestamp_field) <= late)
                .unique(key, keep="any")
                .with_columns(
                    late.alias(view.timestamp_field),
                    *(pl.lit(PLANTED).cast(true.schema[n]).alias(n) for n in view.features),
                )
            )
            pl.concat([planted, true]).write_parquet(path)
            honest = _ours([view], questions)
            leaky = _ours([replace(view, source_path=str(path))], questions)
            for name in view.features:
                changed |= ~(
                    (honest[name] == leaky[name]) | (np.isnan(honest[name]) & np.isnan(leaky[name]))
                )
            joined = as_of_join(view, questions, moments, Sources())
            changed |= joined.found & (joined.event_us > moments)
    return int(changed.sum())
