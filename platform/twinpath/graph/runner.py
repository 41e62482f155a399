"""One node in this process: its calls, the checks of what it returns, and poison rows."""

import asyncio
import copy
import inspect
import logging
import time
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
from twinpath.graph.plan import Step

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
        outcome = self.checked(result, n)
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
            return Outcome.failure(RowError(RowFailedError.code, text, self.step.name), n)
        halves = []
        for start, stop in ((0, n // 2), (n // 2, n)):
            part = {name: values[start:stop] for name, values in columns.items()}
            halves.append(await self.call(part))
        return joined(halves)

    def checked(self, result: Any, n: int) -> Outcome:
        """What the node gave for n rows, held to its contract. Raises NodeContractError."""
        step = self.step
        if not isinstance(result, dict):
            raise NodeContractError(
                f"node {step.name!r}: predict must return Columns (dict of numpy arrays), "
                f"got {type(result).__name__}"
            )
        outputs, failed = step.outputs, None
        written: Columns = {}
        noted: Columns = {}
        for name, values in result.items():
            if name == ROW_ERROR:
                failed = values
                if values is None:
                    continue
            elif name.startswith(NOTE):
                noted[name[len(NOTE) :]] = values
            elif outputs is None or name in outputs:
                written[name] = values
            else:
                raise NodeContractError(
                    f"node {step.name!r} returned column {name!r}, which its outputs do not "
                    f"declare.{did_you_mean(name, outputs)}"
                )
            if not isinstance(values, np.ndarray) or values.ndim == 0 or len(values) != n:
                got = f"shape {values.shape}" if isinstance(values, np.ndarray) else type(values)
                raise NodeContractError(
                    f"node {step.name!r}, column {name!r}: expected a numpy array of {n} rows "
                    f"(as many as it was given), got {got}"
                )
        columns = written if outputs is None else self._conformed(written)
        notes = {step.name: (positions(n), noted)} if noted else {}
        if failed is None:
            return Outcome(n, columns, positions(n), {}, batch_notes=notes)
        good = np.array([value is None for value in failed], dtype=bool)
        errors = {int(i): _failed(failed[i], step.name) for i in np.flatnonzero(~good)}
        rows = np.flatnonzero(good)
        return Outcome(n, take(columns, rows), rows, errors, batch_notes=notes)

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
