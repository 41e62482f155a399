"""Four nodes of the flights example, as a Twinpath graph and composed the stock way on Serve."""

import inspect
from typing import Any

import numpy as np
from pydantic import BaseModel
from ray import serve
from starlette.requests import Request

from graphs.flights_model.decide import Decide
from graphs.flights_model.nodes import DelayModel
from graphs.flights_model.preprocess import Preprocess
from graphs.flights_model.schema import FlightRequest, flights_dir
from graphs.flights_model.store import lookup
from twinpath import Columns, Graph
from twinpath.graph.columns import concat, row_count
from twinpath.graph.schema import Schema


class Verdict(BaseModel):
    """What both ways answer."""

    p_delay: float
    delayed: bool
    reason: str


DIR = str(flights_dir())


class DecideAlone(Decide):
    """The decision where there is no second opinion."""

    inputs = {n: t for n, t in Decide.inputs.items() if n not in ("p_review", "reviewed")}

    def predict(self, columns: Columns) -> Columns:
        """One opinion counts."""
        no = np.zeros(row_count(columns), dtype=bool)
        return super().predict(columns | {"p_review": columns["p_delay"], "reviewed": no})


graph = Graph("fused", input=FlightRequest, output=Verdict)
with graph as flight:
    score = DelayModel(DIR)(lookup(flights_dir())(Preprocess(DIR)(flight)))
    graph.output(DecideAlone(data_dir=DIR)(score))

app = graph.app


class Stock:
    """A node as a deployment: columns in, all columns out."""

    def __init__(self, node: Any) -> None:
        self.node = node
        self.node.setup()

    async def __call__(self, columns: Columns) -> Columns:
        """One request."""
        found = self.node.predict(columns)
        return columns | (await found if inspect.isawaitable(found) else found)


class StockModel(Stock):
    """The model, with Serve's own batching."""

    @serve.batch(max_batch_size=256)
    async def __call__(self, requests: list[Columns]) -> list[Columns]:
        """Requests joined by Serve."""
        joined = concat(requests)
        scored = joined | self.node.predict(joined)
        stops = np.cumsum([row_count(columns) for columns in requests])[:-1]
        parts = {name: np.split(values, stops) for name, values in scored.items()}
        return [{name: parts[name][i] for name in parts} for i in range(len(requests))]


@serve.deployment(max_ongoing_requests=256)
class StockIngress:
    """HTTP in, four handle calls, JSON out."""

    def __init__(self, *handles: Any) -> None:
        self.handles = handles
        self.given = Schema(FlightRequest, "the input")
        self.answer = Schema(Verdict, "the output")

    async def __call__(self, request: Request) -> dict[str, Any]:
        """One request."""
        columns = self.given.from_json_rows(await request.body()).columns
        for handle in self.handles:
            columns = await handle.remote(columns)
        return {"rows": self.answer.to_rows({n: columns[n] for n in self.answer.fields})}


def _deployed(kind: type[Stock], node: Any) -> Any:
    options = {"name": type(node).__name__, "max_ongoing_requests": 256}
    return serve.deployment(kind).options(**options).bind(node)


stock = StockIngress.bind(
    _deployed(Stock, Preprocess(DIR)),
    _deployed(Stock, lookup(flights_dir())),
    _deployed(StockModel, DelayModel(DIR)),
    _deployed(Stock, DecideAlone(data_dir=DIR)),
)
