"""What an engine's scheduler says of its load."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest

from twinpath.nodes.llm_load import EngineLoad


def stats(running=0, waiting=0, skipped=0, kv=0.0, queries=0, hits=0):
    return SimpleNamespace(
        num_running_reqs=running, num_waiting_reqs=waiting, num_skipped_waiting_reqs=skipped,
        kv_cache_usage=kv, prefix_cache_stats=SimpleNamespace(queries=queries, hits=hits),
    )  # fmt: skip


def test_the_last_figures_are_kept_and_prefix_tokens_added_up():
    load = EngineLoad()
    logger = load.logger(object(), 0)
    logger.record(stats(3, 2, 1, 0.5, 100, 40), object(), engine_idx=0)
    logger.record(None, object())
    logger.record(stats(1, 0, 0, 0.25, 50, 50), None)
    assert (load.running, load.waiting, load.kv_use) == (1, 0, 0.25)
    assert (load.prefix_queries, load.prefix_hits) == (150, 90)


async def test_rows_of_an_engine_go_out_one_by_one_and_come_back_in_their_order():
    pytest.importorskip("ray.serve")
    from twinpath.graph.columns import Outcome, RowError
    from twinpath.online.handles import remote

    sent = []

    class Handle:
        def remote(self, columns, left_s):
            async def answer():
                sent.append(columns["x"].tolist())
                await asyncio.sleep(0.01 * (5 - columns["x"][0]))
                if columns["x"][0] == 2:
                    error = RowError("row_failed", "two")
                    return Outcome(1, {}, np.arange(0), {0: error})
                return Outcome.success({"y": columns["x"] * 10}, 1)

            return answer()

    outcome = await remote(Handle(), by_row=True, node="llm")({"x": np.arange(5)})
    assert sent == [[0], [1], [2], [3], [4]]
    assert outcome.columns["y"].tolist() == [0, 10, 30, 40]
    assert outcome.rows.tolist() == [0, 1, 3, 4]
    assert outcome.errors[2].message == "two"
