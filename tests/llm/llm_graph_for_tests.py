"""Graphs whose one node is an engine, for a served session: what a worker of Ray imports."""

import json
import os

from pydantic import BaseModel

from twinpath import Graph
from twinpath.nodes.llm import LLM, Embed


class Prompt(BaseModel):
    """What a caller of the graph's own endpoint writes."""

    prompt: str
    session: str | None = None


class Written(BaseModel):
    """What comes back."""

    text: str
    finish_reason: str


class Line(BaseModel):
    """What is embedded."""

    text: str


class Point(BaseModel):
    """Where it lies."""

    embedding: list[float]


ENGINE = json.loads(os.environ["TWINPATH_TEST_ENGINE"])


writer = Graph("writer", input=Prompt, output=Written)
with writer as rows:
    llm = LLM(
        os.environ["TWINPATH_TEST_LLAMA"],
        sampling={"temperature": 0},
        session="session",
        engine=ENGINE,
        openai=json.loads(os.environ.get("TWINPATH_TEST_OPENAI", "{}")),
    )
    writer.output(llm(rows))
chat_app = writer.app

points = Graph("points", input=Line, output=Point)
with points as lines:
    options = json.loads(os.environ.get("TWINPATH_TEST_POINTS", "{}"))
    points.output(Embed(os.environ["TWINPATH_TEST_MINILM"], engine=options)(lines))
points_app = points.app
