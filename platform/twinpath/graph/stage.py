"""The executor that all runtimes share: runs steps of a plan on one batch of columns."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import numpy as np

from twinpath.errors import NodeContractError, did_you_mean
from twinpath.graph.columns import PIN, Columns, Outcome, RowError, row_count, take
from twinpath.graph.dtypes import type_of
from twinpath.graph.expressions import Where, mask
from twinpath.graph.frames import Frame, State, gap_fill, input_frame, merge
from twinpath.graph.plan import INPUT, Names, Plan, Step
from twinpath.graph.runner import NodeRunner

NodeCall = Callable[[Columns], Awaitable[Outcome]]
NO_BRANCH = "no branch of the graph gave this row an output: check the where= conditions"


def _first(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error of a group: a caller sees what a run without branches would raise."""
    error: BaseException = failures
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class Executor:
    """Runs a plan, or some of its steps, on batches.

    ``remotes`` replaces the node of a step, by name, with a call that takes the columns it reads
    and returns its own (a placed replica). All other nodes live in this process.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        steps: Sequence[Step] | None = None,
        remotes: Mapping[str, NodeCall] | None = None,
        offload_after_ms: float | None = None,
    ) -> None:
        self.plan = plan
        self.steps = tuple(plan.steps if steps is None else steps)
        remotes = remotes or {}
        self._runners = {
            step.id: NodeRunner(step, offload_after_ms)
            for step in self.steps
            if step.node is not None and step.name not in remotes
        }
        self._calls: dict[int, NodeCall] = {id: r.call for id, r in self._runners.items()}
        self._calls |= {s.id: remotes[s.name] for s in self.steps if s.name in remotes}
        self._concurrent = any(step.parallel for step in self.steps)

    @property
    def nodes(self) -> dict[str, Any]:
        """The nodes that are set up in this process, by name."""
        return {runner.step.name: runner.node for runner in self._runners.values()}

    @property
    def suspends(self) -> bool:
        """Whether a run may wait on something, and so needs an event loop."""
        return self._concurrent or any(
            inspect.iscoroutinefunction(r.step.node.predict) for r in self._runners.values()
        )

    def setup(self) -> None:
        """Set up every node of this process; if one fails, those before it are torn down."""
        try:
            for runner in self._runners.values():
                runner.setup()
        except BaseException:
            self.teardown()
            raise

    def teardown(self) -> None:
        """Tear down every node of this process."""
        for runner in self._runners.values():
            runner.teardown()

    async def run(self, columns: Columns) -> Outcome:
        """Validated input columns (n rows) to output columns; a row's failure is its own. ``PIN``
        may be beside them, for the nodes that take it."""
        n = row_count(columns)
        pins = columns.get(PIN)
        if pins is not None:
            columns = {name: values for name, values in columns.items() if name != PIN}
        state = State(n, {INPUT: input_frame(columns, n, self.plan.live_input)}, pins=pins)
        await self.advance(state)
        return self.collect(state)

    async def advance(self, state: State) -> None:
        """Run this executor's steps; the frames that they read must be in ``state``."""
        if not self._concurrent:
            for step in self.steps:
                await self._step(step, state)
            return
        tasks: dict[int, asyncio.Task[None]] = {}

        async def after(step: Step) -> None:
            for source in step.sources:
                if source in tasks:
                    await tasks[source]
            await self._step(step, state)

        try:
            async with asyncio.TaskGroup() as group:
                for step in self.steps:
                    tasks[step.id] = group.create_task(after(step))
        except BaseExceptionGroup as failures:
            raise _first(failures) from None

    def collect(self, state: State) -> Outcome:
        """The graph's output, rows of early exits first."""
        wanted = tuple(self.plan.output_schema.fields)
        simple = self._simply(state, wanted)
        if simple is not None:
            return simple
        frames = []
        taken = np.zeros(state.n, dtype=bool)
        for leaving in self.plan.exits:
            frame = state.alive(state.frames[leaving.source])
            frame = frame.at(np.flatnonzero(~taken[frame.rows]))
            frames.append(self._selected(frame, leaving.where, "exit", state))
            taken[frames[-1].rows] = True
        results = [state.alive(state.frames[source]) for source in self.plan.results]
        last = merge(results, len(self.plan.steps), gap_fill(self.plan, results))
        frames.append(last.at(np.flatnonzero(~taken[last.rows])))
        parts = [self._output_columns(f, wanted) for f in frames if len(f.rows)]
        rows = np.concatenate([f.rows for f in frames])
        order = np.argsort(rows, kind="stable")
        rows = rows[order]
        columns: Columns = {}
        if parts:
            joined = {n: [p[n] for p in parts] for n in wanted}
            columns = {n: v[0] if len(v) == 1 else np.concatenate(v) for n, v in joined.items()}
            if len(parts) > 1:
                columns = take(columns, order)
        else:
            columns = {n: t.filled(0) for n, t in self.plan.output_schema.fields.items()}
        errors = dict(state.errors)
        bad = self.plan.output_schema.check_output(columns)
        if bad:
            errors |= {int(rows[i]): error for i, error in bad.items()}
            keep = np.flatnonzero(~np.isin(np.arange(len(rows)), list(bad)))
            rows, columns = rows[keep], take(columns, keep)
        lost = set(range(state.n)).difference(rows.tolist(), errors) if len(rows) < state.n else ()
        for row in lost:
            errors[row] = RowError(NodeContractError.code, NO_BRANCH)
        return Outcome(state.n, columns, rows, errors, state.nodes_s, state.remarks, state.notes)

    def _simply(self, state: State, wanted: Sequence[str]) -> Outcome | None:
        """The output if all rows went one way and nothing failed, as nearly always."""
        plan = self.plan
        if plan.exits or len(plan.results) != 1 or state.errors or not state.n:
            return None
        frame = state.frames[plan.results[0]]
        if len(frame.rows) != state.n:
            return None
        columns = self._output_columns(frame, wanted)
        if plan.output_schema.check_output(columns):
            return None
        return Outcome(state.n, columns, frame.rows, {}, state.nodes_s, state.remarks, state.notes)

    def _output_columns(self, frame: Frame, wanted: Sequence[str]) -> Columns:
        schema = self.plan.output_schema
        defaults = schema.defaults()
        columns: Columns = {}
        for name in wanted:
            kind = schema.fields[name]
            if name not in frame.columns:
                if name not in defaults:
                    raise NodeContractError(
                        f"the output needs column {name!r} ({kind}), and no node returned it: "
                        "return it from a node, or give the output's field a default"
                    )
                columns[name] = kind.filled(len(frame.rows), defaults[name])
                continue
            values = kind.conform(frame.columns[name])
            if values is None:
                raise NodeContractError(
                    f"the output's column {name!r}: expected {kind}, got "
                    f"{type_of(frame.columns[name])}: cast it in the node that writes it"
                )
            columns[name] = values
        return columns

    async def _step(self, step: Step, state: State) -> None:
        sources = [state.alive(state.frames[source]) for source in step.sources]
        frame = sources[0]
        if len(sources) > 1:
            frame = merge(sources, step.id, gap_fill(self.plan, sources))
        if step.where is not None and len(frame.rows):
            # Rows are copied here: only what this node or a later one reads is worth it.
            needed = (
                None if step.inputs is None or step.live is None else step.live | {*step.inputs}
            )
            frame = self._selected(frame, step.where, step.name, state, needed)
        if step.node is None:
            state.frames[step.id] = frame.only(step.live)
            return
        outcome = None
        if len(frame.rows):
            started_s = time.perf_counter()
            given = self._given(step, frame)
            if state.pins is not None and getattr(step.node, "pins", False):
                given[PIN] = state.pins[frame.rows]
            outcome = await self._calls[step.id](given)
            state.nodes_s[step.name] = time.perf_counter() - started_s
            state.remarks |= outcome.remarks
            if outcome.batch_notes:
                for node, (rows, noted) in outcome.notes.items():
                    every = len(rows) == len(frame.rows)
                    state.notes[node] = (frame.rows if every else frame.rows[rows], noted)
        if outcome is None or (not len(outcome.rows) and step.outputs is not None):
            written = {name: kind.filled(0) for name, kind in (step.outputs or {}).items()}
        else:
            written = outcome.columns
        if outcome is not None and outcome.errors:
            state.fail(frame.rows, outcome.errors)
            frame = frame.at(outcome.rows)
        origins = (
            frame.origins if step.outputs is not None else dict.fromkeys(frame.origins, step.id)
        )
        state.frames[step.id] = Frame(
            frame.rows, frame.columns | written, origins | dict.fromkeys(written, step.id)
        ).only(step.live)

    def _selected(
        self, frame: Frame, where: Where, name: str, state: State, needed: Names = None
    ) -> Frame:
        """The rows for which the condition holds; a row for which it raises has failed."""
        chosen, errors = mask(where, frame.columns, name)
        if errors:
            state.fail(frame.rows, errors)
        return frame.only(needed).at(np.flatnonzero(chosen))

    def _given(self, step: Step, frame: Frame) -> Columns:
        """The columns that the node reads, checked. A copy of the dict, never of the arrays."""
        if step.inputs is None:
            return dict(frame.columns)
        given: Columns = {}
        for name, wanted in step.inputs.items():
            if name not in frame.columns:
                raise NodeContractError(
                    f"node {step.name!r} reads column {name!r} ({wanted}), which no node upstream "
                    f"returned.{did_you_mean(name, frame.columns)}"
                )
            values = wanted.conform(frame.columns[name])
            if values is None:
                raise NodeContractError(
                    f"node {step.name!r}, column {name!r}: expected {wanted}, got "
                    f"{type_of(frame.columns[name])} from upstream"
                )
            given[name] = values
        return given
