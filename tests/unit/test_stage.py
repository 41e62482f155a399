"""The executor: the reference meaning of a graph, and what one bad row or node may do."""

import asyncio
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from twinpath import ROW_ERROR, Graph, Node, Placement, col
from twinpath.errors import InputError, NodeContractError, OverloadedError, RowFailedError
from twinpath.graph.columns import Outcome
from twinpath.graph.local import LocalRunner
from twinpath.graph.runner import NodeRunner
from twinpath.graph.stage import Executor


class In(BaseModel):
    x: float
    k: int = 0


class Out(BaseModel):
    y: float | None


class Call(Node):
    """Runs a function; declares what it is told to."""

    def __init__(self, function, outputs=None, inputs=None):
        self.function, self.outputs, self.inputs = function, outputs, inputs

    def predict(self, columns):
        return self.function(columns)


class AsyncCall(Call):
    async def predict(self, columns):
        return await self.function(columns)


Y = {"y": "float64"}


def add(by, source="x", target="y", outputs=None):
    return Call(lambda c: {target: c[source] + by}, outputs or {target: "float64"})


def one(node, output=Out, **options):
    """A graph of one node."""
    g = Graph("g", input=In, output=output)
    with g as rows:
        g.output(g.add(node, rows, name="it", **options))
    return g


def xs(*values, **more):
    return {"x": np.array(values, dtype=float), **more}


def ys(result):
    return [None if row is None else row["y"] for row in result.rows()]


# --- nodes and their contract


def test_sync_and_async_nodes_are_fused_into_one_run():
    async def double(columns):
        await asyncio.sleep(0)
        return {"y": columns["y"] * 2}

    g = Graph("g", input=In, output=Out)
    with g as rows:
        g.output(AsyncCall(double)(add(1.0)(rows)))
    assert ys(g.run(xs(1, 2))) == [4.0, 6.0]


def test_a_graph_with_async_nodes_runs_inside_a_running_loop():
    async def double(columns):
        return {"y": columns["x"] * 2}

    async def cell():
        return one(AsyncCall(double, Y)).run(xs(2))

    assert ys(asyncio.run(cell())) == [4.0]


def test_nodes_are_set_up_once_and_torn_down_and_the_graphs_own_stays_clean():
    events = []

    class Heavy:
        def setup(self):
            self.loaded = True
            events.append("setup")

        def predict(self, columns):
            assert self.loaded
            return {"y": columns["x"]}

        def teardown(self):
            events.append("teardown")

    node = Heavy()
    g = one(node)
    g.run(xs(1))
    g.run(xs(1))
    assert not hasattr(node, "loaded")
    g.close()
    assert events == ["setup", "teardown"]


def test_if_one_node_cannot_be_set_up_those_before_it_are_torn_down():
    events = []

    class First(Call):
        def teardown(self):
            events.append("teardown")

    class Second(Call):
        def setup(self):
            raise OSError("no weights")

    g = Graph("g", input=In, output=Out)
    with g as rows:
        g.output(Second(None, Y)(First(None, Y)(rows)))
    with pytest.raises(OSError, match="no weights"):
        LocalRunner(g.plan)
    assert events == ["teardown"]


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda c: {"y": np.zeros(7)}, "'it', column 'y': expected a numpy array of 2 rows.*7"),
        (lambda c: {"y": np.zeros(2, int)}, "'it', column 'y': expected float64, got int64"),
        (lambda c: {"y": np.zeros((2, 3))}, "'it', column 'y': expected float64, got float64.3"),
        (lambda c: {"y": [1.0, 2.0]}, "'it', column 'y': expected a numpy array.*list"),
        (lambda c: {"y": np.float64(1)}, "'it', column 'y': expected a numpy array"),
        (lambda c: {"yy": np.zeros(2)}, "'it' returned column 'yy'.*Did you mean 'y'"),
        (lambda c: {}, "'it' declares column 'y' .float64. but did not return it"),
        (lambda c: None, "'it': predict must return Columns.*NoneType"),
        (lambda c: {"y": np.zeros(2), ROW_ERROR: np.array(["a"], object)}, "__error__"),
    ],
)
def test_a_broken_contract_names_node_column_expected_and_got(function, says):
    with pytest.raises(NodeContractError, match=says):
        one(Call(function, Y)).run(xs(1, 2))


def test_undeclared_columns_are_checked_where_they_are_read():
    g = Graph("g", input=In, output=Out)
    with g as rows:
        first = Call(lambda c: {"z": np.array(["a"] * len(c["x"]), object)})(rows, name="first")
        g.output(Call(lambda c: {"y": c["z"]}, Y, {"z": "float64"})(first, name="second"))
    with pytest.raises(NodeContractError, match="'second', column 'z': expected float64, got str"):
        g.run(xs(1))


def test_an_output_that_no_node_returned_is_named():
    with pytest.raises(NodeContractError, match=r"output needs column 'y'.*no node returned"):
        one(Call(lambda c: {"yy": c["x"]})).run(xs(1))


def test_a_broken_contract_in_a_parallel_branch_is_the_same_error():
    g = Graph("g", input=In, output=Out)
    with g as rows:
        bad = Call(lambda c: {"y": np.zeros(9)}, Y)(rows, name="bad")
        g.output(Call(lambda c: {}, {})(bad, add(1.0, target="z")(rows)))
    with pytest.raises(NodeContractError, match="'bad'"):
        g.run(xs(1))


def test_a_nodes_returned_dict_is_left_as_it_was():
    kept = {"y": np.zeros(2), ROW_ERROR: np.array([None, "no"], object)}
    g = one(Call(lambda c: kept, Y))
    for _ in range(2):
        assert list(g.run(xs(1, 2)).errors) == [1]


# --- rows that fail


def test_a_node_can_fail_single_rows():
    def halves(columns):
        errors = np.array([None if k % 2 == 0 else "odd" for k in columns["k"]], object)
        return {"y": columns["k"] / 2, ROW_ERROR: errors}

    result = one(Call(halves, Y)).run([{"x": 0, "k": k} for k in range(5)])
    assert ys(result) == [0.0, None, 1.0, None, 2.0]
    assert result.errors[1].code == "row_failed"
    assert (result.errors[1].node, result.errors[1].message) == ("it", "node 'it': odd")


def poisoned(error=ValueError):
    def predict(columns):
        if (columns["x"] < 0).any():
            raise error("negative")
        return {"y": columns["x"] + 1}

    return predict


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-2, 3), min_size=1, max_size=30))
def test_rows_for_which_a_node_raises_stand_alone(values):
    result = one(Call(poisoned(), Y)).run(xs(*values))
    assert ys(result) == [None if v < 0 else v + 1.0 for v in values]
    assert set(result.errors) == {i for i, v in enumerate(values) if v < 0}


@pytest.mark.parametrize("error", [ValueError, RowFailedError, InputError, ZeroDivisionError])
def test_every_kind_of_row_failure_is_isolated(error):
    result = one(Call(poisoned(error), Y)).run(xs(1, -1, 2))
    assert ys(result) == [2.0, None, 3.0]
    assert "negative" in result.errors[1].message


def test_a_failure_that_is_no_rows_fault_ends_the_run():
    with pytest.raises(OverloadedError):
        one(Call(poisoned(OverloadedError), Y)).run(xs(1, -1))


def test_an_async_node_that_raises_is_isolated_too():
    async def predict(columns):
        return poisoned()(columns)

    assert ys(one(AsyncCall(predict, Y)).run(xs(1, -1, 2))) == [2.0, None, 3.0]


def test_when_all_rows_fail_there_are_only_errors():
    result = one(Call(poisoned(), None)).run(xs(-1, -2))
    assert ys(result) == [None, None]
    assert result.columns["y"].dtype == np.float64


def test_a_row_that_failed_is_not_given_to_later_nodes():
    seen = []

    def watch(columns):
        seen.extend(columns["x"].tolist())
        return {}

    g = Graph("g", input=In, output=Out)
    with g as rows:
        g.output(Call(watch, {})(Call(poisoned(), Y)(rows)))
    g.run(xs(1, -1, 2))
    assert seen == [1.0, 2.0]


def test_a_condition_that_raises_for_one_row_fails_that_row_only():
    def condition(columns):
        if (columns["x"] < 0).any():
            raise KeyError("negative")
        return columns["x"] > 1

    g = one(add(10.0), where=condition)
    result = g.run(xs(1, -1, 2))
    assert ys(result)[1:] == [None, 12.0]
    assert "where= of node 'it'" in result.errors[1].message


def test_a_condition_that_is_no_boolean_per_row_is_refused():
    with pytest.raises(NodeContractError, match=r"where= of node 'it' must give bool\(2,\)"):
        one(add(1.0), where=lambda c: c["x"]).run(xs(1, 2))


def test_an_output_that_the_model_does_not_allow_is_its_rows_error():
    class Probability(BaseModel):
        y: float = Field(ge=0, le=1)

    result = one(add(0.0), output=Probability).run(xs(0.5, 2.0, 0.1))
    assert list(result.errors) == [1]
    assert result.errors[1].code == "row_failed"


def test_refused_and_failed_rows_keep_their_places():
    rows = [{"x": 1}, {"x": "?"}, {"x": -1}, {"x": 2}, {}]
    result = one(Call(poisoned(), Y)).run(rows)
    assert ys(result) == [2.0, None, None, 3.0, None]
    assert [result.errors[i].code for i in (1, 2, 4)] == [
        "invalid_input", "row_failed", "invalid_input",
    ]  # fmt: skip
    with pytest.raises(InputError, match="3 of 5 rows failed; row 1"):
        result.raise_for_errors()
    assert result.to_pandas().index.tolist() == [0, 3]


def test_no_rows_are_no_answers():
    assert one(add(1.0)).run([]).rows() == []


# --- branches, merges, exits


def branches(g, rows, *, names=("low", "high")):
    low = add(100.0)(rows, where=col("x") < 5, name=names[0])
    high = add(200.0)(rows, where=col("x") >= 5, name=names[1])
    return Call(lambda c: {"y": c["y"]}, Y)(low, high, name="join")


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=0, max_size=20))
def test_complementary_branches_come_back_in_order(values):
    g = Graph("g", input=In, output=Out)
    with g as rows:
        g.output(branches(g, rows))
    # k travels through both branches: a column that cannot be null and needs no default.
    result = g.run([{"x": v, "k": v} for v in values])
    assert ys(result) == [v + (100.0 if v < 5 else 200.0) for v in values]


def test_columns_that_cannot_be_null_pass_through_complementary_branches():
    class Both(BaseModel):
        y: float
        k: int

    g = Graph("g", input=In, output=Both)
    with g as rows:
        g.output(branches(g, rows))
    assert g.run(xs(1, 9, k=np.array([3, 4]))).columns["k"].tolist() == [3, 4]


def test_a_row_of_no_branch_is_an_error_and_not_lost():
    g = one(add(1.0), where=col("x") > 0)
    result = g.run(xs(1, -1))
    assert ys(result) == [2.0, None]
    assert "no branch" in result.errors[1].message


@pytest.mark.parametrize(
    ("values", "wanted"),
    [((1, 9, 2), [None, 19.0, None]), ((1, 2), [None, None]), ((8, 9), [18.0, 19.0])],
)
def test_rows_that_skip_a_branch_are_null_even_when_none_takes_it(values, wanted):
    g = Graph("g", input=In, output=Out)
    with g as rows:
        g.output(rows, add(10.0)(rows, where=col("x") > 5))
    assert ys(g.run(xs(*values))) == wanted


def test_rows_that_skip_a_branch_get_its_default():
    g = Graph("g", input=In, output=Out)
    with g as rows:
        g.output(rows, add(10.0)(rows, where=col("x") > 5, default={"y": -1.0}))
    assert ys(g.run(xs(1, 9))) == [-1.0, 19.0]


def test_a_branch_replaces_a_column_on_its_rows_only():
    g = Graph("g", input=In, output=Out)
    with g as rows:
        first = add(0.0)(rows)
        second = add(10.0, "y")(first, where=col("y") > 5)
        g.output(Call(lambda c: {}, {})(second, first))
    assert ys(g.run(xs(1, 9))) == [1.0, 19.0]


def test_branches_nest():
    g = Graph("g", input=In, output=Out)
    with g as rows:
        outer = add(10.0)(rows, where=col("x") > 2, name="outer")
        inner = add(100.0, "y")(outer, where=col("x") > 4, name="inner")
        g.output(rows, outer, inner)
    assert ys(g.run(xs(1, 3, 5))) == [None, 13.0, 115.0]


def test_a_later_writer_wins_and_a_stale_value_never_does():
    for swapped in (False, True):
        g = Graph("g", input=In, output=Out)
        with g as rows:
            first = add(1.0)(rows, name="first")
            second = add(10.0, "y")(first, name="second")
            # passes y of `first` through, and is wired after `second`
            beside = add(0.0, "x", "z")(first, name="beside")
            pair = (beside, second) if swapped else (second, beside)
            g.output(Call(lambda c: {}, {})(*pair, name="join"))
        assert ys(g.run(xs(1))) == [12.0]


def early(*conditions):
    g = Graph("g", input=In, output=Out)
    with g as rows:
        rest = add(1.0)(rows, name="guess")
        for condition in conditions:
            rest = g.exit(rest, where=condition)
        g.output(Call(lambda c: {"y": c["y"] * 100}, Y)(rest, name="slow"))
    return g


def test_rows_that_exit_early_come_back_in_order():
    assert ys(early(col("x") > 5).run(xs(9, 1, 8, 2))) == [10.0, 200.0, 9.0, 300.0]


@pytest.mark.parametrize(("values", "wanted"), [((8, 9), [9.0, 10.0]), ((1, 2), [200.0, 300.0])])
def test_all_rows_or_none_may_exit(values, wanted):
    assert ys(early(col("x") > 5).run(xs(*values))) == wanted


def test_two_exits_each_take_their_rows():
    g = early(col("x") > 5, lambda c: c["x"] < 2)
    assert ys(g.run(xs(9, 1, 3))) == [10.0, 2.0, 400.0]


def test_rows_that_exited_are_not_computed_further():
    seen = []

    def slow(columns):
        seen.extend(columns["x"].tolist())
        return {"y": columns["x"]}

    g = Graph("g", input=In, output=Out)
    with g as rows:
        g.output(Call(slow, Y)(g.exit(add(1.0)(rows), where=col("x") > 5)))
    g.run(xs(9, 1))
    assert seen == [1.0]


# --- concurrency, remotes


def test_independent_sync_nodes_run_at_the_same_time():
    barrier = threading.Barrier(2, timeout=10)

    def meet(target):
        def predict(columns):
            barrier.wait()
            return {target: columns["x"]}

        return Call(predict, {target: "float64"})

    class Pair(BaseModel):
        a: float
        b: float

    g = Graph("g", input=In, output=Pair)
    with g as rows:
        g.output(meet("a")(rows, name="a"), meet("b")(rows, name="b"))
    assert g.run(xs(1)).rows() == [{"a": 1.0, "b": 1.0}]


def test_independent_async_nodes_run_at_the_same_time():
    events = {}

    def meet(target, other):
        async def predict(columns):
            events.setdefault(target, asyncio.Event()).set()
            await asyncio.wait_for(events.setdefault(other, asyncio.Event()).wait(), 10)
            return {target: columns["x"]}

        return AsyncCall(predict, {target: "float64"})

    class Pair(BaseModel):
        a: float
        b: float

    g = Graph("g", input=In, output=Pair)
    with g as rows:
        g.output(meet("a", "b")(rows, name="a"), meet("b", "a")(rows, name="b"))
    assert g.run(xs(1)).rows() == [{"a": 1.0, "b": 1.0}]


async def test_a_remote_call_replaces_the_node_and_gets_only_what_it_reads():
    given = []

    async def remote(columns):
        given.append(sorted(columns))
        return Outcome.success({"y": columns["x"] * 3}, len(columns["x"]))

    g = one(Call(None, Y, {"x": "float64"}), placement=Placement())
    executor = Executor(g.plan, remotes={"it": remote})
    executor.setup()
    outcome = await executor.run(xs(1, 2, k=np.zeros(2, int)))
    assert outcome.columns["y"].tolist() == [3.0, 6.0]
    assert given == [["x"]]


async def test_a_placed_replica_runs_one_node_with_the_same_checks():
    g = one(Call(poisoned(), Y), placement=Placement())
    runner = NodeRunner(g.plan.steps[0])
    runner.setup()
    outcome = await runner.call(xs(1, -1, 3))
    assert outcome.rows.tolist() == [0, 2]
    assert list(outcome.errors) == [1]
    runner.teardown()
    runner.teardown()


async def test_a_slow_node_moves_to_a_thread():
    threads = []

    def predict(columns):
        threads.append(threading.current_thread() is threading.main_thread())
        return {"y": columns["x"]}

    g = one(Call(predict, Y))
    executor = Executor(g.plan, offload_after_ms=0.0)
    executor.setup()
    for _ in range(3):
        await executor.run(xs(1))
    assert threads == [True, False, False]
