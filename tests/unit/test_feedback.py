"""Labels find the scores that were given for their request, once, and only while they are kept."""

import asyncio
import time
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel

from twinpath import Columns, Graph, Node, col
from twinpath.errors import InputError
from twinpath.graph.columns import NOTE, Outcome, joined, positions
from twinpath.graph.stage import Executor
from twinpath.online.dataplane import Ask
from twinpath.online.rollouts.feedback import BLOCKS, Feedback


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def outcome(scores: list[float], versions: list[str], node: str = "model") -> Outcome:
    rows = positions(len(scores))
    noted = {"version": np.array(versions, object), "score": np.array(scores)}
    return Outcome(len(scores), {}, rows, {}, batch_notes={node: (rows, noted)})


def ask(request_id: str, principal: str | None = None, started_s: float | None = None) -> Ask:
    """A request that came at that moment of the test's clock; now, on the real one."""
    came_s = time.monotonic() if started_s is None else started_s
    return Ask("g", {}, request_id=request_id.encode(), principal=principal, started_s=came_s)


def test_labels_are_joined_with_version_and_score_of_their_rows():
    store = Feedback()
    store.remember(ask("a"), outcome([0.1, 0.9, 0.4], ["1", "2", "1"]))
    join = store.join(b"a", [0.0, 1.0, None])
    assert join is not None
    [rows] = join.rows
    assert (rows.versions, rows.scores, rows.labels) == (["1", "2"], [0.1, 0.9], [0.0, 1.0])


def test_the_same_feedback_again_is_not_counted_again():
    store = Feedback()
    store.remember(ask("a"), outcome([0.1], ["1"]))
    first, second = store.join(b"a", [1.0]), store.join(b"a", [1.0])
    assert first is not None
    assert second is not None
    assert (len(first.rows), first.already) == (1, False)
    assert (len(second.rows), second.already) == (0, True)


def test_an_id_that_is_not_known_or_of_another_caller_joins_nothing():
    store = Feedback()
    store.remember(ask("a", "ann"), outcome([0.1], ["1"]))
    assert store.join(b"b", [1.0], "ann") is None
    assert store.join(b"a", [1.0], "ben") is None
    assert store.join(b"a", [1.0], "ann") is not None


def test_a_wrong_number_of_labels_is_named_and_leaves_the_request_open():
    store = Feedback()
    store.remember(ask("a"), outcome([0.1, 0.2], ["1", "1"]))
    with pytest.raises(InputError, match="1 labels for request 'a', which had 2 rows"):
        store.join(b"a", [1.0])
    join = store.join(b"a", [1.0, 0.0])
    assert join is not None
    assert not join.already


def test_rows_and_time_are_bounded_and_the_oldest_go_first():
    clock = Clock()
    store = Feedback(max_rows=4, max_age_s=10, clock=clock)
    for name in "abc":
        store.remember(ask(name, started_s=clock.now_s), outcome([0.1, 0.2], ["1", "1"]))
        clock.now_s += 1
    assert (store.rows, len(store)) == (4, 2)
    assert store.join(b"a", [1, 1]) is None
    clock.now_s += 8.5
    assert store.join(b"b", [1, 1]) is None
    assert store.join(b"c", [1, 1]) is not None
    store.remember(ask("c"), outcome([0.1], ["1"]))
    again = store.join(b"c", [1])
    assert again is not None
    assert not again.already, "an id that is used again stands for its last request"
    for name in "defg":
        store.remember(ask(name), outcome([0.3], ["1"]))
    assert (store.rows, len(store)) == (4, 4)
    assert store.join(b"c", [1]) is None
    assert store.join(b"d", [1]) is not None


def test_there_are_never_more_rows_than_that_however_they_are_packed():
    store = Feedback(max_rows=3 * BLOCKS)
    most = 0
    for number in range(5 * BLOCKS):
        store.remember(ask(str(number)), outcome([0.1], ["1"]))
        most = max(most, store.rows)
    assert 3 * BLOCKS - 3 <= most <= 3 * BLOCKS


class Row(BaseModel):
    x: float


class Answer(BaseModel):
    y: float


class Scores(Node):
    """y = x; raises for a batch that holds the poison; notes a version for each row."""

    inputs = {"x": "float64"}
    outputs = {"y": "float64"}

    def predict(self, columns: Columns) -> Columns:
        if (columns["x"] == 13).any():
            raise ValueError("13")
        versions = np.where(columns["x"] > 5, "2", "1").astype(object)
        return {"y": columns["x"], NOTE + "version": versions, NOTE + "score": columns["x"]}


@pytest.mark.parametrize("where", [None, col("x") > 2])
def test_notes_go_with_the_rows_and_not_into_the_answer(where: Any):
    graph = Graph("noted", input=Row, output=Answer)
    with graph as row:
        base = Scores()(row, name="base")
        graph.output(base, Scores()(base, where=where, name="model"))
    executor = Executor(graph.plan)
    executor.setup()
    x = np.array([1.0, 7.0, 13.0, 3.0, 9.0, 2.0])
    whole = asyncio.run(executor.run({"x": x}))
    assert set(whole.columns) == {"y"}
    first, second = whole.split([2, 4])
    both = joined([first, second])
    for found in (whole, both):
        rows, noted = found.notes["model"]
        wanted = [i for i in range(6) if x[i] != 13 and (where is None or x[i] > 2)]
        assert rows.tolist() == wanted
        assert noted["score"].tolist() == x[wanted].tolist()
        assert noted["version"].tolist() == ["2" if x[i] > 5 else "1" for i in wanted]
    assert second.notes["base"][0].tolist() == [1, 2, 3]
