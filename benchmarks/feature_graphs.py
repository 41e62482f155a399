"""The flights graph three times: features from Redis, from SQLite, and held in memory."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from graphs.demo import ROWS
from graphs.flights_model.data import asked_at
from graphs.flights_model.decide import Decide
from graphs.flights_model.nodes import CLOSE_CALL, DelayModel, SecondOpinion
from graphs.flights_model.preprocess import Preprocess
from graphs.flights_model.schema import DelayPrediction, FlightRequest, flights_dir
from graphs.flights_model.store import FEATURES, KEYS, MOMENT, lookup
from graphs.flights_model.train import request_columns
from twinpath import Columns, Graph, Node, col

#: Names the folder whose feature repository has Redis as its online store.
REDIS_VARIABLE = "TWINPATH_BENCH_REDIS_DIR"


class Held(Node):
    """The same features, read once and held by the keys of a flight."""

    inputs = {**KEYS, "as_of": "datetime64[us]"}
    outputs = FEATURES

    def setup(self) -> None:
        """Read the features of all flights that are asked for."""
        folder = flights_dir()
        requests = folder / "data" / "requests" / f"2013-{MOMENT.month:02d}.parquet"
        columns = request_columns(asked_at(pl.read_parquet(requests), MOMENT).head(ROWS))
        clean = Preprocess(str(folder))
        clean.setup()
        columns |= clean.predict(columns)
        node = lookup(folder).offline()
        node.setup()
        self._values = node.predict(columns)
        keys = zip(*(columns[key].tolist() for key in KEYS), strict=True)
        self._rows = {key: row for row, key in enumerate(keys)}

    def predict(self, columns: Columns) -> Columns:
        """The features."""
        keys = zip(*(columns[key].tolist() for key in KEYS), strict=True)
        rows = np.array([self._rows[key] for key in keys])
        return {name: values[rows] for name, values in self._values.items()}


def _graph(name: str, features: Any) -> Graph:
    folder = str(flights_dir())
    made = Graph(name, input=FlightRequest, output=DelayPrediction)
    with made as flight:
        score = DelayModel(folder)(features(Preprocess(folder)(flight)))
        review = SecondOpinion(folder)(
            score, where=col("p_delay").between(*CLOSE_CALL), default={"reviewed": False}
        )
        made.output(Decide(data_dir=folder)(score, review))
    return made


held = _graph("held", Held()).app
sqlite = _graph("sqlite", lookup(flights_dir())).app
redis = _graph("redis", lookup(Path(os.environ.get(REDIS_VARIABLE, ".")).absolute())).app
