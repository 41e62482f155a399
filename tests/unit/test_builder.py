"""What a graph asks of Ray Serve, as far as no cluster is needed to tell."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel

pytest.importorskip("ray.serve")

from graphs.generate import Prompt, Written, generation
from twinpath import Graph, Node
from twinpath.errors import ConfigError
from twinpath.graph.columns import Columns
from twinpath.nodes.llm import LLM
from twinpath.online import replicas
from twinpath.online.builder import STREAMS_END_S


class Row(BaseModel):
    x: float


class Same(Node):
    inputs = {"x": "float64"}
    outputs = {"x": "float64"}

    def predict(self, columns: Columns) -> Columns:
        return {"x": columns["x"]}


class Bit(Same):
    """Streams."""

    async def stream(self, columns: Columns) -> Any:
        yield {"x": np.array([1.0])}


def patience_s(node: Node) -> float:
    graph = Graph("rows", input=Row, output=Row)
    with graph as rows:
        graph.output(node(rows))
    return float(graph.app({})._bound_deployment._deployment_config.graceful_shutdown_timeout_s)


def test_a_replica_that_has_to_go_may_end_its_streams():
    assert patience_s(Same()) == 20
    assert patience_s(Bit()) == STREAMS_END_S
    graph = Graph("rows", input=Row, output=Row)
    with graph as rows:
        graph.output(Bit().on(num_cpus=1)(rows))
    [placed] = graph.app({})._bound_deployment.init_args[2].values()
    config = placed._bound_deployment._deployment_config
    assert config.graceful_shutdown_timeout_s == STREAMS_END_S


def test_so_may_an_engine_with_replicas_of_its_own_which_has_the_openai_api():
    ingress = generation("none").app({})._bound_deployment
    [engine] = [bound._bound_deployment for bound in ingress.init_args[2].values()]
    for deployment in (ingress, engine):
        assert deployment._deployment_config.graceful_shutdown_timeout_s == STREAMS_END_S
    assert engine.func_or_class is replicas.PlacedEngine


async def test_an_engine_whose_openai_options_are_refused_never_starts(monkeypatch):
    class Refused(LLM):
        def setup(self) -> None:
            """No engine."""

        async def openai_app(self) -> Any:
            raise ConfigError("openai option 'chat_templat' is none")

    graph = Graph("chat", input=Prompt, output=Written)
    with graph as rows:
        graph.output(Refused("none").on(num_cpus=1)(rows))
    side = SimpleNamespace(app=Refused("none").openai_app)
    monkeypatch.setattr(replicas, "EngineSide", lambda *_: side)
    for name in ("settle", "replica_metrics"):
        monkeypatch.setattr(replicas, name, lambda *_: None)
    monkeypatch.delattr(replicas.PlacedNode, "__del__")
    engine = object.__new__(replicas.PlacedEngine)
    with pytest.raises(ConfigError, match="chat_templat"):
        await engine.__init__(graph.plan.steps[0], 10.0)  # type: ignore[misc]
