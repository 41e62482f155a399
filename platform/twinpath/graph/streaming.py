"""One row's answer as it comes: graphs that end in a node with ``stream`` beside ``predict``, or in
one that follows such a node.

``stream(columns)`` of a node is an async generator: it is given one row of the columns that it
reads, and yields batches of one row of its own columns. What they mean is the node's: for an
engine, each has the text that is new, and the last one the counts. Notes are of all that was
streamed so far.

``follow(batches)`` of the node after it is one too: it is given, one by one, batches of one row of
the columns that it reads, with each part of the node before it; a single one, with that node's
defaults, for a row that ``where=`` keeps from it. It has no replicas of its own, and alone reads
from the node that it follows.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple

import numpy as np

from twinpath.errors import (
    GraphError,
    InputError,
    NodeContractError,
    RowFailedError,
    TwinpathError,
    error_of,
)
from twinpath.graph.columns import Columns, Outcome, Rows, row_count
from twinpath.graph.frames import Frame, State, gap_fill, input_frame, merge
from twinpath.graph.plan import INPUT, Plan, Step
from twinpath.graph.runner import NodeRunner
from twinpath.graph.stage import NO_BRANCH, Executor, NodeCall

StreamCall = Callable[[Columns], AsyncIterator[Columns]]


class Streaming(NamedTuple):
    """The node whose parts a graph's answer is made of, and the one that follows it, if any."""

    writer: Step
    follower: Step | None = None


def streaming_steps(plan: Plan) -> Streaming | None:
    """The last node of a graph, if its columns are the output, every row comes to it, and it has
    ``stream``, or has ``follow`` and reads from one node that has ``stream``."""
    last = plan.steps[-1]
    if plan.results != (last.id,) or plan.exits or last.where is not None:
        return None
    if _has(last, "stream"):
        return Streaming(last)
    writers = [step for step in plan.steps if step.id in last.sources and _has(step, "stream")]
    if not _has(last, "follow") or last.placement is not None or len(writers) != 1:
        return None
    [writer] = writers
    readers = [step for step in plan.steps if writer.id in step.sources]
    return Streaming(writer, last) if readers == [last] else None


def _has(step: Step, method: str) -> bool:
    return callable(getattr(step.node, method, None))


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

    async def stream(
        self, columns: Columns, notes: dict[str, tuple[Rows, Columns]] | None = None
    ) -> AsyncIterator[Outcome]:
        """One validated row → batches of one row of the graph's output columns. ``notes`` gets what
        nodes note, as they do, also where no part tells of it.

        Raises GraphError for a graph that cannot be streamed, InputError for more than one row,
        and the error of the row when a node fails it.
        """
        streaming = streaming_steps(self.plan)
        if streaming is None:
            raise GraphError(
                f"graph {self.plan.graph_name!r} cannot be streamed: its output has to come from "
                "one last node, on every row, that has stream(columns), or that has "
                "follow(batches), no replicas of its own, and alone reads from one node with "
                "stream(columns)"
            )
        if row_count(columns) != 1:
            raise InputError(f"one row can be streamed at a time, got {row_count(columns)}")
        writer, follower = streaming
        state = State(1, {INPUT: input_frame(columns, 1, self.plan.live_input)})
        state.notes = {} if notes is None else notes
        for step in self.steps:
            if step is not writer and step is not follower:
                await self._step(step, state)
        frame = self._frame(writer, state)
        if writer.where is not None and not state.errors:
            frame = self._selected(frame, writer.where, writer.name, state)
        if state.errors:
            raise error_of(state.errors[0].code, state.errors[0].message)
        async with aclosing(self._written(writer, frame, state)) as frames:
            whole = frames if follower is None else self._followed(follower, writer, frames, state)
            async with aclosing(whole) as answers:
                async for answer in answers:
                    yield self._part(answer)

    def _frame(self, step: Step, state: State) -> Frame:
        """What a step reads from."""
        sources = [state.frames[source] for source in step.sources]
        return merge(sources, step.id, gap_fill(self.plan, sources))

    async def _written(
        self, writer: Step, frame: Frame, state: State
    ) -> AsyncGenerator[Frame, None]:
        """The writer's frame with each of its parts, or without its row."""
        if not len(frame.rows):
            empty = {name: kind.filled(0) for name, kind in (writer.outputs or {}).items()}
            yield self._joined(writer, frame, empty)
            return
        call: Any = self._streams.get(writer.name) or self.nodes[writer.name].stream
        async with aclosing(_of(writer, call(self._given(writer, frame)), state)) as parts:
            async for part in parts:
                yield self._joined(writer, frame, part)

    @staticmethod
    def _joined(step: Step, frame: Frame, part: Columns) -> Frame:
        origins = frame.origins | dict.fromkeys(part, step.id)
        return Frame(frame.rows, frame.columns | part, origins)

    async def _followed(
        self, follower: Step, writer: Step, frames: AsyncIterator[Frame], state: State
    ) -> AsyncGenerator[Frame, None]:
        """The follower's frame with each of its parts."""
        read: list[Frame] = []

        async def batches() -> AsyncGenerator[Columns, None]:
            async for frame in frames:
                state.frames[writer.id] = frame
                read[:] = [_arrived(self._frame(follower, state))]
                yield self._given(follower, read[0])

        call: Any = self.nodes[follower.name].follow
        async with (
            aclosing(batches()) as given,
            aclosing(_of(follower, call(given), state)) as parts,
        ):
            async for part in parts:
                if not read:
                    raise NodeContractError(
                        f"node {follower.name!r}: follow yielded before it had read a batch"
                    )
                yield self._joined(follower, read[0], part)

    def _part(self, frame: Frame) -> Outcome:
        wanted = tuple(self.plan.output_schema.fields)
        return Outcome.success(self._output_columns(_arrived(frame), wanted), 1)


async def _of(step: Step, parts: Any, state: State) -> AsyncGenerator[Columns, None]:
    """What a node yields, held to its contract, without its notes; what it raises, and the error
    that it gives the row, as the row's failure."""
    runner = NodeRunner(step)
    try:
        async with aclosing(parts):
            async for part in parts:
                outcome = runner.checked(part, 1)
                state.notes |= outcome.notes
                if outcome.errors:
                    raise error_of(outcome.errors[0].code, outcome.errors[0].message)
                yield outcome.columns
    except TwinpathError:
        raise
    except Exception as error:
        text = f"node {step.name!r}: {type(error).__name__}: {error}"
        raise RowFailedError(text) from error


def _arrived(frame: Frame) -> Frame:
    """The frame. Raises NodeContractError when the row did not come to it."""
    if not len(frame.rows):
        raise NodeContractError(NO_BRANCH)
    return frame


def first_row(columns: Columns) -> dict[str, Any]:
    """The first row of columns as plain Python values; NaN is None."""
    row = {}
    for name, values in columns.items():
        value = values[0]
        value = value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value
        row[name] = None if isinstance(value, float) and value != value else value
    return row
