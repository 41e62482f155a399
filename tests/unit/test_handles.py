"""Calls to nodes with replicas of their own, of which one may have ended."""

import numpy as np
import pytest

pytest.importorskip("ray.serve")

from ray.exceptions import RayActorError

from twinpath.graph.columns import Columns, Outcome, row_count
from twinpath.online import handles


class Handle:
    """The other side of Serve: rows below zero come to a replica that ends."""

    def remote(self, columns: Columns, left_s: float | None):
        async def answer() -> Outcome:
            if (columns["x"] < 0).any():
                raise RayActorError
            return Outcome.success({"y": columns["x"] * 2}, row_count(columns))

        return answer()


async def test_rows_of_a_replica_that_ended_fail_alone():
    columns = {"x": np.array([1.0, -1.0, 3.0])}
    outcome = await handles.remote(Handle(), by_row=True, node="double")(columns)
    assert outcome.rows.tolist() == [0, 2]
    assert outcome.columns["y"].tolist() == [2.0, 6.0]
    assert (outcome.errors[1].code, outcome.errors[1].node) == ("retry_later", "double")
    assert "a replica ended before it had answered" in outcome.errors[1].message


async def test_all_rows_that_it_was_given_fail_and_none_is_lost():
    outcome = await handles.remote(Handle(), by_row=False, node="double")(
        {"x": np.array([1.0, -1.0])}
    )
    assert (outcome.n, outcome.rows.tolist()) == (2, [])
    assert {error.code for error in outcome.errors.values()} == {"retry_later"}
