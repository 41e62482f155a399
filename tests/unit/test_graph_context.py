"""What nodes say about their batch reaches the answer; a batch's deadline reaches the nodes."""

import asyncio
import time

import numpy as np
import pytest
from pydantic import BaseModel

from twinpath import Graph, Node
from twinpath.errors import DeadlineError
from twinpath.graph.columns import Columns, Outcome, joined
from twinpath.graph.context import DEADLINE_S, remark
from twinpath.graph.placement import Batch
from twinpath.graph.stage import Executor
from twinpath.online.batcher import Batcher


class Row(BaseModel):
    x: float


class Says(Node):
    inputs = {"x": "float64"}
    outputs = {"x": "float64"}

    def predict(self, columns):
        if columns["x"].min() < 0:
            remark("features", "degraded")
        if len(columns["x"]) > 1 and columns["x"].max() > 100:
            raise ValueError("too many")
        return {"x": columns["x"]}


def graph() -> Graph:
    made = Graph("says", input=Row, output=Row)
    with made as rows:
        made.output(Says()(rows))
    return made


def test_a_remark_is_part_of_the_outcome_and_only_of_that_run():
    says = graph()
    assert says.run([{"x": -1.0}]).outcome.remarks == {"features": "degraded"}
    assert says.run([{"x": 1.0}]).outcome.remarks == {}


def test_a_remark_outlives_the_search_for_a_poison_row():
    found = graph().run([{"x": -1.0}, {"x": 101.0}, {"x": 2.0}]).outcome
    assert found.remarks == {"features": "degraded"}
    assert found.ok


def test_parts_of_a_batch_carry_its_notes():
    outcome = Outcome.success({"x": np.zeros(3)}, 3)
    outcome.remarks["a"] = "b"
    parts = outcome.split([1, 2])
    assert [part.remarks for part in parts] == [{"a": "b"}] * 2
    assert joined(parts).remarks == {"a": "b"}


def test_outside_of_a_run_a_note_is_told_to_nobody():
    remark("features", "degraded")


async def test_a_remark_comes_back_from_a_node_with_replicas_of_its_own(monkeypatch):
    pytest.importorskip("ray")
    from twinpath.online import replicas

    monkeypatch.setattr(replicas, "settle", lambda: None)
    monkeypatch.delattr(replicas.PlacedNode, "__del__")
    made = Graph("placed", input=Row, output=Row)
    with made as rows:
        made.output(Says().on(num_cpus=1)(rows))
    placed = replicas.PlacedNode(made.plan.steps[0], 10.0)
    answer = await placed({"x": np.array([-1.0])})
    assert answer.remarks == {"features": "degraded"}


async def test_a_node_with_replicas_of_its_own_knows_until_when_anybody_waits(monkeypatch):
    pytest.importorskip("ray")
    from twinpath.online import handles, replicas

    seen: list[float | None] = []

    class Until(Says):
        async def predict(self, columns: Columns) -> Columns:
            seen.append(DEADLINE_S.get())
            return {"x": columns["x"]}

    monkeypatch.setattr(replicas, "settle", lambda: None)
    monkeypatch.delattr(replicas.PlacedNode, "__del__")
    made = Graph("placed", input=Row, output=Row)
    with made as rows:
        made.output(Until().on(num_cpus=1)(rows))
    placed = replicas.PlacedNode(made.plan.steps[0], 10.0)

    class Handle:
        """The other side of Serve: what is sent arrives, some time later."""

        async def remote(self, *sent):
            return await placed(*sent)

    call = handles.remote(Handle(), by_row=False, node="says")
    columns = {"x": np.array([1.0])}
    await call(columns)
    DEADLINE_S.set(time.monotonic() + 60)
    await call(columns)
    DEADLINE_S.set(time.monotonic() - 1)
    with pytest.raises(DeadlineError):
        await call(columns)
    none, soon = seen  # the last was not run
    assert none is None
    assert 0 < soon - time.monotonic() <= 60


async def test_a_node_learns_when_the_last_of_its_batch_stops_waiting():
    seen = []

    async def run(columns):
        seen.append(DEADLINE_S.get())
        return Outcome.success(columns, len(columns["x"]))

    batcher = Batcher(run, Batch(max_size=8))
    soon, late = time.monotonic() + 60, time.monotonic() + 90
    rows = {"x": np.zeros(1)}
    await asyncio.gather(batcher.submit(rows, soon), batcher.submit(rows, late))
    await asyncio.gather(batcher.submit(rows, soon), batcher.submit(rows))
    assert seen == [late, None]


def test_a_node_has_itself_for_batch_jobs_unless_it_says_otherwise():
    class Other(Says):
        def offline(self, features="as_of"):
            return Says() if features == "as_of" else self

    made = Graph("other", input=Row, output=Row)
    with made as rows:
        made.output(Other()(Says()(rows)))
    first, second = made.plan.offline().steps
    assert (type(first.node), type(second.node)) == (Says, Says)
    assert type(made.plan.offline("now").steps[1].node) is Other
    assert Executor(made.plan.offline()).plan.graph_name == "other"
