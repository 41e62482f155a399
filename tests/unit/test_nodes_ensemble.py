"""Ensembles."""

import pickle

import numpy as np
import pytest
from pydantic import BaseModel

from twinpath import Graph, Node, col
from twinpath.errors import GraphError, NodeContractError, UnknownColumnError
from twinpath.nodes.ensemble import Mean, Stacking, Vote, Weighted

NAN = float("nan")


def columns(**named):
    return {name: np.array(values) for name, values in named.items()}


def test_the_mean_leaves_out_members_without_a_value():
    node = Mean(["a", "b"], "p")
    result = node.predict(columns(a=[1.0, NAN, NAN], b=[3.0, 4.0, NAN]))
    np.testing.assert_array_equal(result["p"], [2.0, 4.0, NAN])
    assert (node.inputs, node.outputs) == ({"a": "float64", "b": "float64"}, {"p": "float64"})


def test_weights_need_not_add_up_to_one():
    node = Weighted({"a": 1.0, "b": 3.0, "c": 0.0}, "p")
    result = node.predict(columns(a=[0.0, 4.0], b=[4.0, NAN], c=[9.0, 9.0]))
    assert result["p"].tolist() == [3.0, 4.0]


def test_the_majority_wins_and_the_first_of_equals():
    node = Vote(["a", "b", "c"], "label")
    result = node.predict(
        {
            "a": np.array(["x", "x", None, None], object),
            "b": np.array(["y", "y", "z", None], object),
            "c": np.array(["y", "w", None, None], object),
        }
    )
    assert result["label"].tolist() == ["y", "x", "z", None]


def test_numbers_vote_too():
    node = Vote(["a", "b", "c"], "label", kind="int64")
    assert node.predict(columns(a=[1, 1], b=[2, 2], c=[2, 3]))["label"].tolist() == [2, 1]


class Estimator:
    def predict_proba(self, members):
        p = members.mean(axis=1)
        return np.stack([1 - p, p], axis=1)


class Meta(Node):
    outputs = {"p": "float64"}

    def setup(self):
        self.scale = 2.0

    def predict(self, columns):
        return {"p": columns["a"] * self.scale}


@pytest.mark.parametrize(
    ("meta", "wanted"),
    [(Estimator(), [0.5]), (lambda m: m.max(axis=1), [0.75]), (Meta(), [0.5])],
)
def test_stacking_asks_an_estimator_a_function_or_a_node(meta, wanted):
    node = Stacking(["a", "b"], "p", meta)
    node.setup()
    assert node.predict(columns(a=[0.25], b=[0.75]))["p"].tolist() == wanted
    node.teardown()


def test_a_real_estimator_stacks():
    linear = pytest.importorskip("sklearn.linear_model")
    members = np.random.default_rng(0).random((50, 2))
    model = linear.LogisticRegression().fit(members, members.sum(axis=1) > 1)
    node = pickle.loads(pickle.dumps(Stacking(["a", "b"], "p", model)))
    result = node.predict({"a": members[:, 0], "b": members[:, 1]})["p"]
    np.testing.assert_allclose(result, model.predict_proba(members)[:, 1])


def test_a_meta_model_of_another_shape_is_named():
    node = Stacking(["a"], "p", lambda members: members)
    with pytest.raises(NodeContractError, match=r"Stacking\('p'\).*expected shape \(2,\)"):
        node.predict(columns(a=[1.0, 2.0]))


@pytest.mark.parametrize(
    "build",
    [
        lambda: Mean([], "p"),
        lambda: Mean("ab", "p"),
        lambda: Mean(["a", "a"], "p"),
        lambda: Weighted({"a": -1.0}, "p"),
        lambda: Weighted({"a": NAN}, "p"),
        lambda: Weighted({"a": 0.0}, "p"),
        lambda: Stacking(["a"], "p", 3),
    ],
)
def test_impossible_ensembles_are_refused(build):
    with pytest.raises(GraphError):
        build()


class In(BaseModel):
    x: float


class Out(BaseModel):
    p: float


class Scale(Node):
    def __init__(self, by, target):
        self.by, self.target = by, target
        self.outputs = {target: "float64"}

    def predict(self, columns):
        return {self.target: columns["x"] * self.by}


def test_an_ensemble_in_a_graph_reads_its_members_and_skips_branches_not_taken():
    g = Graph("g", input=In, output=Out)
    with g as rows:
        one = Scale(1.0, "a")(rows)
        two = Scale(3.0, "b")(rows, where=col("x") > 1)
        g.output(Mean(["a", "b"], "p").on(num_cpus=1)(one, two))
    assert g.run([{"x": 1.0}, {"x": 2.0}]).columns["p"].tolist() == [1.0, 4.0]
    assert g.plan.placed[0].sends == ("a", "b")


def test_a_member_that_nothing_produces_is_refused():
    g = Graph("g", input=In, output=Out)
    with pytest.raises(UnknownColumnError, match="column 'bb'"), g as rows:
        g.output(Mean(["a", "bb"], "p")(Scale(1.0, "a")(rows)))
