"""The executor that all runtimes share: runs steps of a plan on one batch of columns."""

import asyncio
import copy
import inspect
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import numpy as np

from twinpath.errors import (
    InputError,
    NodeContractError,
    RowFailedError,
    TwinpathError,
    did_you_mean,
)
from twinpath.graph.columns import (
    NOTE,
    PIN,
    ROW_ERROR,
    Columns,
    Outcome,
    RowError,
    joined,
    positions,
    row_count,
    take,
)
from twinpath.graph.context import collect_remarks
from twinpath.graph.dtypes import type_of
from twinpath.graph.expressions import Where, mask
from twinpath.graph.frames import Frame, State, gap_fill, input_frame, merge
from twinpath.graph.plan import INPUT, Names, Plan, Step

NodeCall = Callable[[Columns], Awaitable[Outcome]]
_LOG = logging.getLogger(__name__)


class NodeRunner:
    """One node in this process: a fresh copy of it, contract checks, and poison rows set apart.

    ``offload_after_ms``: a synchronous predict that takes longer than this (moving average) is
    run in a thread, so that the event loop goes on; None runs it in place.
    """

    def __init__(self, step: Step, offload_after_ms: float | None = None) -> None:
        self.step = step
        self._node: Any = None
        self._threshold_s = None if offload_after_ms is None else offload_after_ms / 1000
        self._average_s = 0.0

    def setup(self) -> None:
        """Copy the node and load it; the graph's own instance stays pure configuration."""
        node = copy.deepcopy(self.step.node)
        getattr(node, "setup", lambda: None)()
        self._node = node

    @property
    def node(self) -> Any:
        """The node that is set up; None before and after."""
        return self._node

    def teardown(self) -> None:
        """Release what the node holds. Harmless when it was never set up."""
        node, self._node = self._node, None
        getattr(node, "teardown", lambda: None)()

    async def call(self, columns: Columns) -> Outcome:
        """The node's own columns for n rows. Raises NodeContractError for a broken contract;
        a row for which ``predict`` raises becomes that row's error."""
        n = row_count(columns)
        remarks = collect_remarks()
        try:
            result = await self._predict(columns)
        except (RowFailedError, InputError) as error:
            return await self._isolate(columns, n, error)
        except TwinpathError:
            raise
        except Exception as error:
            return await self._isolate(columns, n, error)
        outcome = self._checked(result, n)
        outcome.remarks = remarks
        return outcome

    async def _predict(self, columns: Columns) -> Any:
        started = time.perf_counter()
        in_thread = self.step.parallel and self.step.placement is None
        if self._threshold_s is not None:
            in_thread |= self._average_s > self._threshold_s
        if in_thread and not inspect.iscoroutinefunction(self._node.predict):
            result = await asyncio.to_thread(self._node.predict, columns)
        else:
            result = self._node.predict(columns)
            if inspect.isawaitable(result):
                return await result
        self._average_s += 0.2 * (time.perf_counter() - started - self._average_s)
        return result

    async def _isolate(self, columns: Columns, n: int, error: Exception) -> Outcome:
        """Halve a batch that raises until the offending rows stand alone."""
        if n <= 1:
            _LOG.info("node %s failed for a row: %r", self.step.name, error)
            text = f"node {self.step.name!r}: {type(error).__name__}: {error}"
            failed = dict.fromkeys(range(n), RowError(RowFailedError.code, text, self.step.name))
            return Outcome(n, {}, np.arange(0), failed)
        halves = []
        for start, stop in ((0, n // 2), (n // 2, n)):
            part = {name: values[start:stop] for name, values in columns.items()}
            halves.append(await self.call(part))
        return joined(halves)

    def _checked(self, result: Any, n: int) -> Outcome:
        step = self.step
        if not isinstance(result, dict):
            raise NodeContractError(
                f"node {step.name!r}: predict must return Columns (dict of numpy arrays), "
                f"got {type(result).__name__}"
            )
        failed = result.get(ROW_ERROR)
        noted = {name: values for name, values in result.items() if name.startswith(NOTE)}
        result = {n: v for n, v in result.items() if n != ROW_ERROR and n not in noted}
        outputs = result if step.outputs is None else step.outputs
        for name in result:
            if name not in outputs:
                raise NodeContractError(
                    f"node {step.name!r} returned column {name!r}, which its outputs do not "
                    f"declare.{did_you_mean(name, outputs)}"
                )
        given = result | noted if failed is None else {**result, **noted, ROW_ERROR: failed}
        for name, values in given.items():
            if not isinstance(values, np.ndarray) or values.ndim == 0 or len(values) != n:
                got = f"shape {values.shape}" if isinstance(values, np.ndarray) else type(values)
                raise NodeContractError(
                    f"node {step.name!r}, column {name!r}: expected a numpy array of {n} rows "
                    f"(as many as it was given), got {got}"
                )
        columns = self._conformed(result) if step.outputs is not None else result
        notes = {}
        if noted:
            kept = {name[len(NOTE) :]: values for name, values in noted.items()}
            notes[step.name] = (positions(n), kept)
        if failed is None:
            return Outcome(n, columns, positions(n), {}, notes=notes)
        good = np.array([value is None for value in failed], dtype=bool)
        errors = {int(i): _failed(failed[i], step.name) for i in np.flatnonzero(~good)}
        rows = np.flatnonzero(good)
        return Outcome(n, take(columns, rows), rows, errors, notes=notes)

    def _conformed(self, result: Columns) -> Columns:
        columns: Columns = {}
        for name, wanted in (self.step.outputs or {}).items():
            if name not in result:
                raise NodeContractError(
                    f"node {self.step.name!r} declares column {name!r} ({wanted}) but did not "
                    f"return it.{did_you_mean(name, result)}"
                )
            conformed = wanted.conform(result[name])
            if conformed is None:
                raise NodeContractError(
                    f"node {self.step.name!r}, column {name!r}: expected {wanted}, got "
                    f"{type_of(result[name])}: cast it in predict, or declare what it returns"
                )
            columns[name] = conformed
        return columns


def _failed(given: Any, node: str) -> RowError:
    """A row's error, of the text or the error that the node gave for it."""
    if isinstance(given, RowError):
        return RowError(given.code, given.message, node, given.field)
    return RowError(RowFailedError.code, f"node {node!r}: {given}", node)


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
            text = "no branch of the graph gave this row an output: check the where= conditions"
            errors[row] = RowError(NodeContractError.code, text)
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
            for node, (rows, noted) in outcome.notes.items():
                state.notes[node] = (frame.rows[rows], noted)
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
