"""local == offline, stage by stage through Arrow, on random graphs and without a cluster."""

import numpy as np
import pyarrow as pa
from hypothesis import HealthCheck, assume, example, given, settings

from parity.random_graphs import Row, recipes, rows, try_build
from twinpath.graph.columns import ROW_ERROR, Columns, row_count, take
from twinpath.graph.local import LocalRunner, read_input
from twinpath.graph.schema import Schema
from twinpath.offline.blocks import decode_errors
from twinpath.offline.stages import StageCall


def through_arrow(block: pa.Table | Columns) -> Columns:
    """What a block looks like after it has crossed Ray's object store as an Arrow table."""
    table = block if isinstance(block, pa.Table) else pa.table(block)
    return {name: table[name].to_numpy() for name in table.column_names}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(recipe=recipes, data=rows)
# A declared column meets an undeclared one before a process edge, and only one of them is read on.
@example(
    recipe=[
        ("affine", 0, [0], False, False),
        ("undeclared", 0, [0], False, False),
        ("affine", 0, [0], False, False),
        ("affine", 3, [0, 2], False, True),
        ("affine", 0, [5], False, False),
    ],
    data=[{"a": 0.0, "b": 0, "text": "x", "c": None}],
)
def test_a_chain_of_stage_calls_gives_what_the_local_runtime_gives(recipe, data):
    graph = try_build("random", recipe)
    assume(graph is not None)
    columns = read_input(Schema(Row, "rows"), data).columns
    with LocalRunner(graph.plan) as runner:
        expected = runner.run(columns)
    block = columns
    for stage in graph.plan.stages:
        block = through_arrow(StageCall(graph.plan, stage.index, (), None)(block))
    errors = decode_errors(block.pop(ROW_ERROR))
    assert row_count(block) == len(data)
    assert {i: e.code for i, e in errors.items()} == {i: e.code for i, e in expected.errors.items()}
    good = take(block, expected.outcome.rows)
    for name, values in expected.columns.items():
        if values.dtype == object:
            assert good[name].tolist() == values.tolist(), name
        else:
            np.testing.assert_array_equal(good[name], values, err_msg=name)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(recipe=recipes, data=rows)
def test_a_row_gets_the_same_answer_alone_and_in_a_batch(recipe, data):
    graph = try_build("random", recipe)
    assume(graph is not None)
    with LocalRunner(graph.plan) as runner:
        together = runner.run(data).rows()
        assert [runner.run([row]).rows()[0] for row in data] == together
