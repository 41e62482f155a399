"""The local runtime: a plan in this process, the reference meaning of a graph."""

import asyncio
import threading
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel

from twinpath.errors import InputError, TwinpathError
from twinpath.graph.columns import Columns, Outcome, RowError
from twinpath.graph.plan import Plan
from twinpath.graph.schema import Schema
from twinpath.graph.stage import Executor

T = TypeVar("T")


class Driver:
    """Runs coroutines to their end from synchronous code, also inside a running event loop.

    A coroutine that never waits is driven in place; others run on a loop in a thread of its own.
    Several threads may call :meth:`run` at a time.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, coroutine: Coroutine[Any, Any, T], suspends: bool) -> T:
        """The coroutine's result. ``suspends`` tells whether it may wait on something."""
        if not suspends:
            try:
                coroutine.send(None)
            except StopIteration as end:
                result: T = end.value
                return result
            coroutine.close()
            raise TwinpathError("a node waited although its predict is not 'async def'")
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, daemon=True).start()
            loop = self._loop
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result()

    def close(self) -> None:
        """Stop the loop's thread, if there is one."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop = None


@dataclass(frozen=True, slots=True)
class Result:
    """What ``graph.run`` returns: an outcome, readable as rows, columns or a DataFrame."""

    outcome: Outcome
    schema: Schema

    def __len__(self) -> int:
        return self.outcome.n

    @property
    def columns(self) -> Columns:
        """Output columns of the rows that succeeded."""
        return self.outcome.columns

    @property
    def errors(self) -> dict[int, RowError]:
        """Row position → why it has no answer."""
        return self.outcome.errors

    def rows(self) -> list[dict[str, Any] | None]:
        """One mapping for each input row, None for a row that failed."""
        rows: list[dict[str, Any] | None] = [None] * self.outcome.n
        answers = self.schema.to_rows(self.outcome.columns)
        for position, row in zip(self.outcome.rows.tolist(), answers, strict=True):
            rows[position] = row
        return rows

    def to_pandas(self) -> Any:
        """A DataFrame of the rows that succeeded, indexed by input position."""
        import pandas as pd

        return pd.DataFrame(self.outcome.columns, index=self.outcome.rows)

    def raise_for_errors(self) -> "Result":
        """This result, or InputError that names the first rows that failed."""
        if self.errors:
            shown = [f"row {i}: {e.message}" for i, e in sorted(self.errors.items())[:3]]
            raise InputError(f"{len(self.errors)} of {len(self)} rows failed; {'; '.join(shown)}")
        return self


def read_input(schema: Schema, data: Any) -> Outcome:
    """Rows, one row, Columns or a DataFrame, validated. Raises InputError for anything else."""
    if hasattr(data, "columns") and hasattr(data, "to_numpy"):
        return schema.from_frame(data)
    if isinstance(data, BaseModel):
        return schema.from_rows([data])
    if isinstance(data, Mapping):
        if data and all(isinstance(values, np.ndarray) for values in data.values()):
            return schema.from_columns(dict(data))
        return schema.from_rows([data])
    if isinstance(data, Sequence) and not isinstance(data, (str, bytes)):
        return schema.from_rows(data)
    raise InputError(
        f"cannot read {type(data).__name__}: expected a list of rows, one row, a DataFrame, or "
        "Columns (dict of numpy arrays)"
    )


def after_validation(checked: Outcome, answered: Outcome) -> Outcome:
    """Put the answers to the valid rows back among the rows that validation refused."""
    if checked.ok:
        return answered
    errors = checked.errors | {int(checked.rows[i]): e for i, e in answered.errors.items()}
    rows = checked.rows[answered.rows]
    return Outcome(checked.n, answered.columns, rows, errors, remarks=answered.remarks)


class LocalRunner:
    """A plan set up in this process. Close it, or use it in a ``with`` block."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._executor = Executor(plan)
        self._executor.setup()
        self._driver = Driver()

    def run(self, data: Any) -> Result:
        """Rows | DataFrame | Columns → Result. Raises NodeContractError, InputError."""
        checked = read_input(self.plan.input_schema, data)
        answered = self._driver.run(self._executor.run(checked.columns), self._executor.suspends)
        return Result(after_validation(checked, answered), self.plan.output_schema)

    def close(self) -> None:
        """Tear the nodes down."""
        self._executor.teardown()
        self._driver.close()

    def __enter__(self) -> "LocalRunner":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
