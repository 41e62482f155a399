"""One row's answer as it comes: graphs whose last node has ``stream`` beside ``predict``.

``stream(columns)`` of a node is an async generator: it is given one row of the columns that it
reads, and yields batches of one row of its own columns. What they mean is the node's: for an
engine, each has the text that is new, and the last one the counts. Notes are of all that was
streamed so far.
"""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import numpy as np

from twinpath.errors import GraphError, InputError, error_of
from twinpath.graph.columns import NOTE, Columns, Outcome, positions, row_count
from twinpath.graph.frames import Frame, State, gap_fill, input_frame, merge
from twinpath.graph.plan import INPUT, Plan, Step
from twinpath.graph.stage import Executor, NodeCall

StreamCall = Callable[[Columns], AsyncIterator[Columns]]


def streaming_step(plan: Plan) -> Step | None:
    """The node that a graph's answers can be streamed from: the one whose columns are the output,
    if it has ``stream`` and every row comes to it."""
    last = plan.steps[-1]
    streams = callable(getattr(last.node, "stream", None))
    whole = plan.results == (last.id,) and not plan.exits and last.where is None
    return last if streams and whole else None


class StreamingExecutor(Executor):
    """An executor that can also stream. ``streams`` has the calls to nodes that run elsewhere."""

    def __init__(
        self,
        plan: Plan,
        *,
        steps: Sequence[Step] | None = None,
        remotes: Mapping[str, NodeCall] | None = None,
        streams: Mapping[str, StreamCall] | None = None,
        offload_after_ms: float | None = None,
    ) -> None:
        super().__init__(plan, steps=steps, remotes=remotes, offload_after_ms=offload_after_ms)
        self._streams = dict(streams or {})

    async def stream(self, columns: Columns) -> AsyncIterator[Outcome]:
        """One validated row → batches of one row of the graph's output columns, with notes.

        Raises GraphError for a graph that cannot be streamed, InputError for more than one row,
        and the error of the row when a node before the last one fails it.
        """
        last = streaming_step(self.plan)
        if last is None:
            raise GraphError(
                f"graph {self.plan.graph_name!r} cannot be streamed: its output has to come from "
                "one last node that has stream(columns), on every row"
            )
        if row_count(columns) != 1:
            raise InputError(f"one row can be streamed at a time, got {row_count(columns)}")
        state = State(1, {INPUT: input_frame(columns, 1, self.plan.live_input)})
        for step in self.steps:
            if step is not last:
                await self._step(step, state)
        if state.errors:
            raise error_of(state.errors[0].code, state.errors[0].message)
        sources = [state.frames[source] for source in last.sources]
        frame = merge(sources, last.id, gap_fill(self.plan, sources))
        wanted = tuple(self.plan.output_schema.fields)
        call: Any = self._streams.get(last.name) or self.nodes[last.name].stream
        async with aclosing(call(self._given(last, frame))) as parts:
            async for part in parts:
                whole = Frame(positions(1), frame.columns | part, {})
                outcome = Outcome.success(self._output_columns(whole, wanted), 1)
                noted = {n[len(NOTE) :]: v for n, v in part.items() if n.startswith(NOTE)}
                outcome.batch_notes = state.notes | {last.name: (positions(1), noted)}
                yield outcome


def first_row(columns: Columns) -> dict[str, Any]:
    """The first row of columns as plain Python values; NaN is None."""
    row = {}
    for name, values in columns.items():
        value = values[0]
        value = value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value
        row[name] = None if isinstance(value, float) and value != value else value
    return row
