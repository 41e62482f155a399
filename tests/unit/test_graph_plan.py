"""Compiling: stages, dead columns, and what crosses to placed nodes."""

import numpy as np
import pytest
from pydantic import BaseModel

from twinpath import Graph, Node, Placement, Replicas, col
from twinpath.errors import UnknownNodeError
from twinpath.graph.explain import explain


class In(BaseModel):
    a: float
    b: float
    unused: str


class Out(BaseModel):
    y: float


class Make(Node):
    """Writes ``target`` from the columns it reads."""

    def __init__(self, target, *sources):
        self.target = target
        self.inputs = dict.fromkeys(sources, "float64")
        self.outputs = {target: "float64", f"{target}_extra": "float64"}

    def predict(self, columns):
        total = np.sum(list(columns.values()), axis=0)
        return {self.target: total, f"{self.target}_extra": total}


def diamond(**placed):
    """input → first → (left, right) → y; nodes named in ``placed`` are placed."""

    def node(name, *sources):
        made = Make(name, *sources)
        return made.on(**placed[name]) if name in placed else made

    g = Graph("g", input=In, output=Out)
    with g as rows:
        first = node("first", "a", "b")(rows, name="first")
        left = node("left", "first")(first, name="left")
        right = node("right", "first", "b")(first, name="right")
        dead = Make("dead", "first")(first, name="dead")
        assert dead
        g.output(node("y", "left", "right")(left, right, name="y"))
    return g


def stages(g):
    return [stage.name for stage in g.plan.stages]


def test_nodes_without_placement_are_one_stage_and_dead_nodes_do_not_run():
    assert stages(diamond()) == ["first+left+right+y"]


def test_placed_nodes_are_stages_of_their_own_between_fused_ones():
    assert stages(diamond(left={"num_gpus": 1})) == ["first+right", "left", "y"]
    assert stages(diamond(left={}, right={})) == ["first", "left", "right", "y"]
    assert stages(diamond(first={})) == ["first", "left+right+y"]
    assert stages(diamond(y={})) == ["first+left+right", "y"]
    assert stages(diamond(first={}, left={}, y={})) == ["first", "right", "left", "y"]


def test_a_stage_never_comes_before_what_it_reads():
    for names in ((), ("first",), ("left", "y"), ("first", "left", "right", "y")):
        plan = diamond(**{name: {} for name in names}).plan
        seen = {-1}
        for stage in plan.stages:
            for step in stage.steps:
                assert set(step.sources) <= seen
                seen.add(step.id)


def test_dead_columns_are_dropped_at_the_edge_and_never_cross():
    plan = diamond(right={}).plan
    right = next(step for step in plan.steps if step.name == "right")
    assert plan.live_input & set(In.model_fields) == {"a", "b"}
    assert right.sends == ("b", "first")
    assert right.returns == ("right",)


def test_only_siblings_run_in_parallel():
    marks = {step.name: step.parallel for step in diamond().plan.steps}
    assert marks == {"first": False, "left": True, "right": True, "y": False}


def test_placements_can_be_replaced_by_name():
    plan = diamond(left={"num_gpus": 1}).plan
    replicas = Placement(replicas=Replicas(2))
    again = plan.with_placements({"left": None, "y": replicas}, ingress=replicas)
    assert [step.name for step in again.placed] == ["y"]
    assert again.placement == replicas
    assert [step.name for step in plan.placed] == ["left"]
    with pytest.raises(UnknownNodeError, match="Did you mean 'left'"):
        plan.with_placements({"letf": None})


def test_an_undeclared_node_is_sent_everything():
    class Anything:
        def predict(self, columns):
            return {"y": columns["a"]}

    g = Graph("g", input=In, output=Out)
    with g as rows:
        g.output(g.add(Anything(), rows, placement=Placement()))
    assert g.plan.live_input is None
    assert g.plan.placed[0].sends is None
    (crossing,) = explain(g.plan).crossings
    assert "declare inputs" in crossing.hint


def test_explain_tells_stages_edges_crossings_and_dead_columns():
    found = explain(diamond(left={"num_gpus": 1, "replicas": Replicas(0, 4)}).plan)
    assert found.dead_inputs == ("unused",)
    assert [stage.nodes for stage in found.stages] == [("first", "right"), ("left",), ("y",)]
    assert found.stages[1].online == "Serve deployment 'left' (1 GPU)"
    assert found.stages[1].replicas == (0, 4)
    assert found.stages[0].online == "inside the ingress deployment 'g'"
    assert found.crossings[0].sends == ("first",)
    assert ("first", "left") in {(edge.source, edge.target) for edge in found.edges}
    assert found.as_dict()["graph"] == "g"


def test_a_condition_keeps_its_column_alive():
    g = Graph("g", input=In, output=Out)
    with g as rows:
        g.output(Make("y", "a")(rows, where=col("unused") == "x"))
    assert g.plan.live_input >= {"a", "unused"}
    assert explain(g.plan).dead_inputs == ("b",)
