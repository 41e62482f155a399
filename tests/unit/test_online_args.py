"""The arguments of a served graph: typos are refused, what is given replaces, the rest stays."""

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from twinpath import Graph, Node, Replicas
from twinpath.graph.columns import Columns
from twinpath.graph.placement import Batch, Placement
from twinpath.online.args import GraphArgs, args_model, place

ROOT = Path(__file__).resolve().parents[2]


class _X(BaseModel):
    x: float


class _Y(BaseModel):
    y: float


class _Copy(Node):
    inputs = {"x": "float64"}
    outputs = {"y": "float64"}

    def predict(self, columns: Columns) -> Columns:
        return {"y": columns["x"]}


class _Half(Node):
    inputs = {"y": "float64"}
    outputs = {"y": "float64"}

    def predict(self, columns: Columns) -> Columns:
        return {"y": columns["y"] / 2}


PLACED = Placement(
    num_cpus=0.5, num_gpus=1, replicas=Replicas(1, 3, target_queue=7), batch=Batch(max_size=9)
)


@pytest.fixture
def graph() -> Graph:
    """`first` is fused and `half` is placed."""
    graph = Graph("small", input=_X, output=_Y)
    with graph as row:
        half = _Half().on(num_cpus=0.5, num_gpus=1, replicas=PLACED.replicas, batch=PLACED.batch)
        graph.output(half(_Copy()(row, name="first"), name="half"))
    return graph


def placements(graph: Graph, **nodes: Any) -> dict[str, Placement | None]:
    plan = place(graph.plan, args_model(graph.plan).model_validate({"nodes": nodes}))
    return {step.name: step.placement for step in plan.steps if step.node is not None}


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"ingres": {}}, "unknown key 'ingres'. Did you mean 'ingress'?"),
        ({"ingress": {"num_cpu": 1}}, "unknown key 'num_cpu'. Did you mean 'num_cpus'?"),
        ({"nodes": {"hafl": {}}}, "unknown key 'hafl'. Did you mean 'half'?"),
        ({"nodes": {"half": {"replica": {}}}}, "unknown key 'replica'. Did you mean 'replicas'?"),
        ({"nodes": {"half": {"replicas": {"min": 3, "max": 1}}}}, "max (1) is below min (3)"),
        ({"nodes": {"half": {"num_cpus": -1}}}, "greater than or equal to 0"),
        ({"ingress": {"max_queue_rows": 0}}, "greater than or equal to 1"),
    ],
)
def test_what_is_wrong_is_refused_with_what_was_meant(graph: Graph, args: Any, says: str):
    with pytest.raises(ValidationError) as refused:
        args_model(graph.plan).model_validate(args)
    assert says in str(refused.value)


def test_nothing_given_changes_nothing(graph: Graph):
    assert placements(graph) == {"first": None, "half": PLACED}


def test_a_key_that_is_given_replaces_and_the_others_stay(graph: Graph):
    found = placements(graph, half={"replicas": {"min": 2, "max": 2}})
    assert found["half"] == PLACED.model_copy(update={"replicas": Replicas(2, 2)})
    assert found["first"] is None


def test_a_fused_node_is_placed_by_its_name(graph: Graph):
    found = placements(graph, first={"num_cpus": 0.1})
    assert found == {"first": Placement(num_cpus=0.1), "half": PLACED}


@pytest.mark.parametrize("key", ["num_cpus", "num_gpus", "resources", "replicas", "batch"])
def test_null_is_as_good_as_not_given(graph: Graph, key: str):
    assert placements(graph, half={key: None})["half"] == PLACED


def test_the_ingress_is_placed_too(graph: Graph):
    args = args_model(graph.plan).model_validate({"ingress": {"replicas": {"min": 2, "max": 5}}})
    assert place(graph.plan, args).placement.replicas == Replicas(2, 5)
    assert graph.plan.placement.replicas == Replicas(), "the graph itself is left alone"


def test_serve_sees_a_pydantic_model_in_the_builders_signature(graph: Graph):
    [parameter] = inspect.signature(graph.app).parameters.values()
    assert isinstance(parameter.annotation, type), "a string would make Serve give a plain dict"
    assert issubclass(parameter.annotation, GraphArgs)


def test_a_module_with_an_app_is_imported_without_ray():
    code = (
        "import sys, graphs_for_tests; assert callable(graphs_for_tests.fused_app); "
        "assert 'ray' not in sys.modules and 'starlette' not in sys.modules"
    )
    paths = os.pathsep.join(str(ROOT / part) for part in ("platform", "tests/online"))
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths}, cwd=ROOT,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
