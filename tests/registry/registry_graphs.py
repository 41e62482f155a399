"""Graphs with a registered model, for tests on Ray."""

from pydantic import BaseModel

from twinpath import Graph, RegistryModel


class Row(BaseModel):
    """Three numbers."""

    a: float
    b: float
    c: float


class Scored(BaseModel):
    """The score, and the version that gave it."""

    score: float
    version: str


def _graph(name: str, poll_s: float) -> Graph:
    graph = Graph(name, input=Row, output=Scored)
    with graph as row:
        model = RegistryModel(
            "served",
            inputs=dict.fromkeys("abc", "float64"),
            model_version="version",
            poll_s=poll_s,
        )
        graph.output(model(row, name="model"))
    return graph


fused = _graph("scored", poll_s=0.5)
fused_app = fused.app
#: One that has to be told of a change.
told_app = _graph("told", poll_s=3600.0).app
