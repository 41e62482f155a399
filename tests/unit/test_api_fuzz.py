"""The described API against generated requests, good and bad: what it answers is documented."""

import pytest
import schemathesis
from hypothesis import settings
from pydantic import BaseModel, Field
from schemathesis.checks import CheckFunction
from schemathesis.specs.openapi import checks

from twinpath import Batch, Columns, Graph, Node
from twinpath.graph.stage import Executor
from twinpath.online.app import GraphApp, graph_app
from twinpath.online.batcher import Batcher

pytestmark = pytest.mark.slow


class Number(BaseModel, extra="forbid", strict=True):
    x: float = Field(examples=[2.0])
    label: str = "none"


class Answer(BaseModel):
    y: float
    label: str


class Double(Node):
    inputs, outputs = {"x": "float64"}, {"y": "float64"}

    def predict(self, columns: Columns) -> Columns:
        if (columns["x"] == 1).any():
            raise ValueError("one is refused")
        return {"y": columns["x"] * 2}


def app() -> GraphApp:
    graph = Graph("numbers", input=Number, output=Answer)
    with graph as number:
        graph.output(Double()(number))
    executor = Executor(graph.plan)
    executor.setup()
    return graph_app(graph.plan, Batcher(executor.run, Batch()), max_body_bytes=1 << 20)


#: Of every answer. That a request fits the schema does not make its tensors fit the model, so a
#: standard protocol's endpoint may refuse it; the typed endpoint's schema says all.
ALWAYS: list[CheckFunction] = [
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
TYPED: list[CheckFunction] = [*ALWAYS, checks.negative_data_rejection]
api = schemathesis.openapi.from_asgi("/openapi.json", app())


@api.parametrize()
@settings(max_examples=150, deadline=None)
def test_every_answer_is_as_described(case: schemathesis.Case):
    typed = case.path.endswith("/predict") and (case.query or {}).get("on_error") != "partial"
    case.call_and_validate(checks=TYPED if typed else ALWAYS)
