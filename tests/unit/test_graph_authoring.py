"""Writing graphs: what is wired, and what is refused while it is written."""

import pickle
from dataclasses import dataclass

import cloudpickle
import numpy as np
import pytest
from pydantic import BaseModel, ValidationError

from twinpath import Batch, Graph, Node, Placement, Replicas, col
from twinpath.errors import (
    CycleError,
    DuplicateNameError,
    GraphError,
    UnknownColumnError,
    UnknownNodeError,
)


class In(BaseModel):
    x: float
    unused: str = ""


class Out(BaseModel):
    y: float


class Add(Node):
    """``target = source + by``."""

    def __init__(self, source="x", target="y", by=1.0):
        self.source, self.target, self.by = source, target, by
        self.inputs, self.outputs = {source: "float64"}, {target: "float64"}

    def setup(self):
        self.heavy = lambda: None  # cannot be pickled

    def predict(self, columns):
        return {self.target: columns[self.source] + self.by}


class Plain:
    def predict(self, columns):
        return {"y": columns["x"] * 2}


@dataclass(frozen=True)
class Frozen(Node):
    by: float

    def predict(self, columns):
        return {"y": columns["x"] + self.by}


def graph(output=Out):
    return Graph("g", input=In, output=output)


def test_a_chain_runs_and_shows_its_wiring():
    g = graph()
    with g as rows:
        g.output(Add("z", "y")(Add("x", "z")(rows)))
    assert g.run([{"x": 1.0}]).rows() == [{"y": 3.0}]
    assert repr(g) == "Graph('g': In → add → add_2 → Out)"


def test_a_plain_class_with_predict_is_a_node():
    g = graph()
    with g as rows:
        g.output(g.add(Plain(), rows))
    assert g.run({"x": np.array([2.0])}).columns["y"].tolist() == [4.0]


def test_a_frozen_dataclass_is_a_node():
    g = graph()
    with g as rows:
        g.output(Frozen(2.0).on(num_cpus=1)(rows))
    assert g.run([{"x": 1.0}]).columns["y"].tolist() == [3.0]
    assert g.plan.placed[0].placement.num_cpus == 1


@pytest.mark.parametrize("pickler", [pickle, cloudpickle])
def test_a_node_pickles_as_its_constructors_arguments(pickler):
    node = Add(by=3.0).on(num_gpus=1)
    node.setup()
    again = pickler.loads(pickler.dumps(node))
    assert again.by == 3.0
    assert again.outputs == {"y": "float64"}
    assert again._placement.num_gpus == 1
    assert not hasattr(again, "heavy")


@pytest.mark.parametrize("pickler", [pickle, cloudpickle])
def test_a_graph_pickles_after_a_run_without_what_it_loaded(pickler):
    g = graph()
    with g as rows:
        g.output(Add()(rows))
    g.run([{"x": 1.0}])
    again = pickler.loads(pickler.dumps(g))
    assert again.run([{"x": 1.0}]).rows() == [{"y": 2.0}]
    assert not hasattr(g.plan.steps[0].node, "heavy")


def test_on_copies_the_node():
    node = Add()
    placed = node.on(replicas=Replicas(0, 4, target_queue=8), batch=Batch(max_size=32))
    assert node._placement is None
    assert placed._placement.replicas.max == 4


def test_nodes_wired_by_name_may_come_later_and_the_later_writer_still_wins():
    g = graph()
    with g as rows:
        # `last` is wired first, but runs after `first`, whose y it replaces.
        last = Add("y", "y", 10.0)("first", name="last")
        first = Add("x", "y")(rows, name="first")
        g.output(Add("y", "y", 0.0)(first, last, name="both"))
    assert [step.name for step in g.plan.steps] == ["first", "last", "both"]
    assert [step.id for step in g.plan.steps] == [0, 1, 2]
    assert g.run([{"x": 1.0}]).rows() == [{"y": 12.0}]


def test_a_cycle_is_spelled_out():
    g = graph()
    with pytest.raises(CycleError, match="a ← b ← a"), g:  # noqa: PT012
        Add("y", "z")("b", name="a")
        g.output(Add("z", "y")("a", name="b"))


def test_an_unknown_node_is_hinted():
    g = graph()
    with pytest.raises(UnknownNodeError, match="Did you mean 'first'"), g as rows:  # noqa: PT012
        Add()(rows, name="first")
        g.output(Add("y", "y")("frist", name="second"))


def test_an_unknown_column_is_hinted():
    g = graph()
    with (
        pytest.raises(UnknownColumnError, match=r"column 'scroe'.*Did you mean 'score'"),
        g as rows,
    ):
        g.output(Add("scroe", "y")(Add("x", "score")(rows)))


def test_an_unknown_column_of_a_condition_is_hinted():
    g = graph()
    with pytest.raises(UnknownColumnError, match=r"where= of node 'add'.*'xx'"), g as rows:
        g.output(Add()(rows, where=col("xx") > 1))


def test_an_output_that_nothing_produces_is_refused():
    g = graph()
    with pytest.raises(UnknownColumnError, match="the output needs column 'y'"), g as rows:
        g.output(Add("x", "z")(rows))


def test_a_type_that_does_not_fit_names_node_column_expected_and_got():
    class Text(Node):
        outputs = {"z": "str"}

    g = graph()
    with (
        pytest.raises(GraphError, match="'add', column 'z': expected float64, got str"),
        g as rows,
    ):
        g.output(Add("z", "y")(Text()(rows)))


def test_names_are_unique_and_readable():
    g = graph()
    with g as rows:
        handle = Add()(rows, name="one")
        with pytest.raises(DuplicateNameError, match="'one'"):
            Add()(rows, name="one")
        with pytest.raises(GraphError, match="no node name"):
            Add()(rows, name="1 2")
        g.output(handle)


def test_two_branches_for_all_rows_may_not_write_the_same_column():
    g = graph()
    with pytest.raises(DuplicateNameError, match="both write column 'y'"), g as rows:  # noqa: PT012
        left, right = Add()(rows, name="left"), Add()(rows, name="right")
        g.output(Add("y", "y")(left, right))


def test_a_branch_declares_its_outputs_and_what_skipped_rows_get():
    class Flag(Node):
        outputs = {"flag": "bool"}

    g = graph()
    with g as rows:
        with pytest.raises(GraphError, match="must declare its outputs"):
            g.add(Plain(), rows, where=col("x") > 0)
        with pytest.raises(GraphError, match=r"cannot be null.*default"):
            Flag()(rows, where=col("x") > 0)
        with pytest.raises(GraphError, match=r"names column 'fla'.*Did you mean 'flag'"):
            Flag()(rows, where=col("x") > 0, default={"fla": True})
        with pytest.raises(GraphError, match="no condition"):
            Add()(rows, where=3)
        g.output(Add()(rows))


@pytest.mark.parametrize("at_output", [False, True])
def test_a_node_further_down_a_branch_may_not_leave_what_cannot_be_null(at_output):
    class Further(Node):
        outputs = {"k": "int64"}

    g = graph()
    with pytest.raises(GraphError, match="'further' runs on some rows only"), g as rows:  # noqa: PT012
        branch = Add()(rows, where=col("x") > 0)
        deep = Further()(branch)
        g.output(*((deep, rows) if at_output else (Add("x", "y", 5.0)(deep, rows, name="merge"),)))


def test_two_handles_of_the_output_may_not_write_the_same_column():
    g = graph()
    with pytest.raises(DuplicateNameError, match="'output' merges"), g as rows:
        g.output(Add()(rows, name="left"), Add()(rows, name="right"))


@pytest.mark.parametrize(
    ("wire", "says"),
    [
        (lambda g, rows: g.add(Add, rows), "create it first"),
        (lambda g, rows: g.add(object(), rows), "no node"),
        (lambda g, rows: Add()(), "wired to nothing"),
        (lambda g, rows: Add()(3), "expected a handle"),
        (lambda g, rows: g.output(), "exactly once"),
        (lambda g, rows: None, "no output"),
    ],
)
def test_wiring_mistakes_say_what_to_do(wire, says):
    g = graph()
    with pytest.raises(GraphError, match=says), g as rows:
        wire(g, rows)


def test_handles_of_another_graph_are_refused():
    g, other = graph(), graph()
    with other as foreign:
        other.output(Add()(foreign))
    with pytest.raises(GraphError, match=r"complete|another graph"), g as rows:
        g.output(g.add(Add(), rows, foreign))


def test_a_complete_graph_is_frozen():
    g = graph()
    with g as rows:
        g.output(Add()(rows))
    with pytest.raises(GraphError, match="complete"):
        g.add(Add(), rows)
    with pytest.raises(GraphError, match="complete"), g:
        pass


def test_a_node_outside_a_graph_is_refused():
    with pytest.raises(GraphError, match="open the graph first"):
        Add()("x")


def test_a_condition_has_no_truth_value():
    with pytest.raises(GraphError, match="join conditions"):
        _ = 0 < col("x") < 1


def test_placements_refuse_typos_and_impossible_bounds():
    with pytest.raises(ValidationError, match="num_gpu"):
        Placement(num_gpu=1)
    with pytest.raises(ValidationError, match="below min"):
        Replicas(4, 2)
    assert Replicas(3) == Replicas(3, 3)
    assert Replicas(3).fixed
    with pytest.raises(TypeError, match="at most"):
        Replicas(1, 2, 3)
