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


fused = Graph("scored", input=Row, output=Scored)
with fused as row:
    model = RegistryModel(
        "served",
        inputs=dict.fromkeys("abc", "float64"),
        model_version="version",
        poll_s=0.5,
    )
    fused.output(model(row, name="model"))
fused_app = fused.app
