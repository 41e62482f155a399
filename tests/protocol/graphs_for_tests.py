"""Graphs that the clients talk to."""

from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from twinpath import Columns, Graph, Node, Tensor


class Wide(BaseModel):
    """A tensor of every numeric type, and text."""

    BOOL: Annotated[NDArray[Any], Tensor("bool[2]")]
    INT8: Annotated[NDArray[Any], Tensor("int8[2]")]
    INT16: Annotated[NDArray[Any], Tensor("int16[2]")]
    INT32: Annotated[NDArray[Any], Tensor("int32[2]")]
    INT64: Annotated[NDArray[Any], Tensor("int64[2]")]
    UINT8: Annotated[NDArray[Any], Tensor("uint8[2]")]
    UINT16: Annotated[NDArray[Any], Tensor("uint16[2]")]
    UINT32: Annotated[NDArray[Any], Tensor("uint32[2]")]
    UINT64: Annotated[NDArray[Any], Tensor("uint64[2]")]
    FP16: Annotated[NDArray[Any], Tensor("float16[2]")]
    FP32: Annotated[NDArray[Any], Tensor("float32[2]")]
    FP64: Annotated[NDArray[Any], Tensor("float64[2]")]
    BYTES: str


class Copy(Node):
    """Gives back what it was given."""

    def predict(self, columns: Columns) -> Columns:
        """Nothing of its own."""
        return {}


class Halves(BaseModel):
    x: Annotated[NDArray[Any], Tensor("bfloat16[4]")]


class Features(BaseModel):
    x: Annotated[NDArray[Any], Tensor("float32[4]")]


class Scores(BaseModel):
    scores: Annotated[NDArray[Any], Tensor("float32[4]")]
    best: int


class Score(Node):
    inputs = {"x": "float32[4]"}
    outputs = {"scores": "float32[4]", "best": "int64"}

    def predict(self, columns: Columns) -> Columns:
        """Twice the features, and which is the largest."""
        if (columns["x"] == 13).any():
            raise ValueError("thirteen")
        scores = columns["x"] * np.float32(2)
        return {"scores": scores, "best": scores.argmax(1)}


wide = Graph("wide", input=Wide, output=Wide)
with wide as rows:
    wide.output(Copy()(rows))

halves = Graph("halves", input=Halves, output=Halves)
with halves as rows:
    halves.output(Copy()(rows))

scores = Graph("scores", input=Features, output=Scores)
with scores as rows:
    scores.output(Score()(rows))

wide_app, halves_app, scores_app = wide.app, halves.app, scores.app
