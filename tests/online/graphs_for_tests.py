"""Small graphs that the tests serve; replicas import them from this folder."""

import asyncio
import time
from typing import Any

import numpy as np
from pydantic import BaseModel, Field

from twinpath import Graph, Node, Replicas, col
from twinpath.graph.columns import Columns
from twinpath.graph.placement import Batch


class Number(BaseModel):
    """A row."""

    x: float = Field(examples=[2.0])
    label: str = "none"


class Answer(BaseModel):
    """Its answer."""

    y: float
    label: str


class Double(Node):
    """y = 2 x; raises for a batch that holds the poison."""

    inputs = {"x": "float64"}
    outputs = {"y": "float64"}

    def __init__(self, poison: float = 13.0) -> None:
        self.poison = poison

    def predict(self, columns: Columns) -> Columns:
        if (columns["x"] == self.poison).any():
            raise ValueError(f"cannot double {self.poison}")
        return {"y": columns["x"] * 2}


class AddOne(Node):
    """y = y + 1."""

    inputs = {"y": "float64"}
    outputs = {"y": "float64"}

    def predict(self, columns: Columns) -> Columns:
        return {"y": columns["y"] + 1}


class Slow(Node):
    """y = x, after a while that does not depend on the batch's size."""

    inputs = {"x": "float64"}
    outputs = {"y": "float64"}

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def predict(self, columns: Columns) -> Columns:
        time.sleep(self.seconds)
        return {"y": columns["x"].astype(np.float64)}


class Wait(Node):
    """y = x, after x seconds of the row that has most."""

    inputs = {"x": "float64"}
    outputs = {"y": "float64"}

    async def predict(self, columns: Columns) -> Columns:
        await asyncio.sleep(columns["x"].max())
        return {"y": columns["x"]}


class TooFew(Node):
    """Breaks its contract: it forgets the last row."""

    inputs = {"x": "float64"}
    outputs = {"y": "float64"}

    def predict(self, columns: Columns) -> Columns:
        return {"y": columns["x"][:-1]}


fused = Graph("fused", input=Number, output=Answer)
with fused as number:
    fused.output(AddOne()(Double()(number)))
fused_app = fused.app

#: Large numbers take a branch on a replica of its own.
branched = Graph("branched", input=Number, output=Answer)
with branched as number:
    doubled = Double()(number)
    large = AddOne().on(num_cpus=0.1)(doubled, where=col("x") > 10, name="large")
    branched.output(doubled, large)
branched_app = branched.app

#: One row at a time, so that a burst is a queue.
burst = Graph("burst", input=Number, output=Answer)
with burst as number:
    scaled = Replicas(1, 3, target_queue=4, downscale_delay_s=2.0)
    burst.output(
        Slow(0.2).on(num_cpus=0.1, replicas=scaled, batch=Batch(max_size=1))(number, name="slow")
    )
burst_app = burst.app

#: No replica until a row comes.
asleep = Graph("asleep", input=Number, output=Answer)
with asleep as number:
    rare = Replicas(0, 1, target_queue=4, downscale_delay_s=2.0)
    asleep.output(Double().on(num_cpus=0.1, replicas=rare)(number, name="rare"))
asleep_app = asleep.app

broken = Graph("broken", input=Number, output=Answer)
with broken as number:
    broken.output(TooFew()(number))
broken_app = broken.app

#: The rows of an ingress wait for each other, so that clients are sure to share a batch.
shared = Graph("shared", input=Number, output=Answer, batch=Batch(max_wait_ms=300))
with shared as number:
    shared.output(Slow(1.0).on(num_cpus=0.1)(number, name="slow"))
shared_app = shared.app

#: One row at a time in the ingress itself, with a short queue: easily too much.
tight = Graph("tight", input=Number, output=Answer, batch=Batch(max_size=1))
with tight as number:
    tight.output(Slow(0.3)(number))
tight_app = tight.app

#: A few rows at a time in the ingress itself, so that the load on it is a queue.
pausing = Graph("pausing", input=Number, output=Answer, batch=Batch(max_size=2))
with pausing as number:
    pausing.output(Slow(0.05)(number))
pausing_app = pausing.app

#: Rows say how long they keep the ingress busy, and the others wait.
waiting = Graph("waiting", input=Number, output=Answer, batch=Batch(max_size=100))
with waiting as number:
    waiting.output(Wait()(number))
waiting_app = waiting.app


def __getattr__(name: str) -> Any:
    # Built when asked for, so that importing the graphs does not import Ray.
    if name == "branched_built":
        return branched_app({})
    raise AttributeError(name)
