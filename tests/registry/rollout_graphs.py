"""The graph that rollouts are tested on; replicas import it from this folder."""

import os
from typing import Literal

from pydantic import BaseModel, Field

from twinpath import Columns, Graph, Node
from twinpath.nodes.registry import RegistryModel

CARRIERS = ("AA", "B6", "DL", "EV", "UA", "WN")


class Flight(BaseModel):
    """A row."""

    carrier: Literal["AA", "B6", "DL", "EV", "UA", "WN"] = "AA"
    hour: float = Field(12.0, ge=0, le=24)
    distance: float = Field(800.0, ge=0)


class Delay(BaseModel):
    """Its answer."""

    score: float
    model_version: str


class Encode(Node):
    """The carrier as a number."""

    inputs = {"carrier": "str"}
    outputs = {"carrier_code": "float64"}

    def predict(self, columns: Columns) -> Columns:
        import numpy as np

        codes = {name: float(code) for code, name in enumerate(CARRIERS)}
        return {"carrier_code": np.array([codes[c] for c in columns["carrier"]], np.float64)}


graph = Graph("delays", input=Flight, output=Delay)
with graph as flight:
    features = Encode()(flight)
    graph.output(
        RegistryModel(
            "delay",
            tracking_uri=os.environ.get("MLFLOW_TRACKING_URI"),
            inputs={"carrier_code": "float64", "hour": "float64", "distance": "float64"},
            outputs={"score": "float64"},
            model_version="model_version",
            segments=("carrier",),
        )(features, name="model")
    )

app = graph.app
