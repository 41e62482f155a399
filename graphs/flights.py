"""Will this flight arrive more than 15 minutes late? Prepare with graphs.flights_model.train."""

from typing import Any

from graphs.flights_model.decide import Decide
from graphs.flights_model.nodes import CLOSE_CALL, SecondOpinion
from graphs.flights_model.preprocess import Preprocess
from graphs.flights_model.registered import delay_model
from graphs.flights_model.schema import DelayPrediction, FlightRequest, flights_dir
from graphs.flights_model.store import lookup
from twinpath import Graph, col

#: Absolute, so that every process of a cluster on this machine finds it, whatever it works in.
data_dir = str(flights_dir())

graph = Graph("flights", input=FlightRequest, output=DelayPrediction)
with graph as flight:
    clean = Preprocess(data_dir)(flight)
    features = lookup(flights_dir())(clean)
    score = delay_model(flights_dir())(features)
    review = SecondOpinion(data_dir)(
        score, where=col("p_delay").between(*CLOSE_CALL), default={"reviewed": False}
    )
    graph.output(Decide(threshold=0.5, data_dir=data_dir)(score, review))

app = graph.app


def __getattr__(name: str) -> Any:
    """``built`` is the application with default args, for ``serve build graphs.flights:built``:
    Ray builds applications only, not builders. Made when asked for, since it imports Ray."""
    if name == "built":
        return app({})
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
