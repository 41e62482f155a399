"""One stage of a plan as a callable class for ``Dataset.map_batches``."""

import hashlib
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from twinpath.errors import RetryLaterError, error_of
from twinpath.graph.columns import ROW_ERROR, Columns, Outcome, RowError, row_count, take
from twinpath.graph.frames import State, input_frame
from twinpath.graph.local import Driver
from twinpath.graph.plan import INPUT, Plan
from twinpath.graph.stage import Executor
from twinpath.offline.blocks import (
    decode,
    decode_errors,
    encode,
    encode_errors,
    live_after,
    to_arrow,
)
from twinpath.offline.checkpoint import Attempt, runs_of
from twinpath.offline.positions import POSITION

#: Prefix of source columns that travel untouched beside the columns of the graph.
SOURCE = "source@"


class StageCall:
    """Runs stage ``index`` of a plan on blocks; set up once in each actor.

    The first stage validates the source's columns; the last one returns the graph's output
    columns, ``keep`` (source columns, unchanged) and ``__error__`` (JSON text, or null). With
    ``dead_letters`` failed rows are written there, with their source columns, and left out. With
    an ``attempt`` it commits each batch there, and returns only how many rows that were.
    """

    def __init__(
        self,
        plan: Plan,
        index: int,
        keep: Sequence[str],
        dead_letters: str | None,
        attempt: Attempt | None = None,
    ) -> None:
        self._plan, self._index = plan, index
        self._keep = tuple(keep)
        self._dead_letters, self._attempt = dead_letters, attempt
        self._first = index == 0
        self._last = index == len(plan.stages) - 1
        self._executor = Executor(plan, steps=plan.stages[index].steps)
        self._executor.setup()
        self._driver = Driver()
        weakref.finalize(self, self._executor.teardown)
        self._before = () if self._first else live_after(plan, index - 1)
        self._after = () if self._last else live_after(plan, index)

    def __call__(self, block: Columns) -> Any:
        """One block to the next."""
        return to_arrow(self._next(block))

    def _next(self, block: Columns) -> Columns:
        if self._first:
            source = block
            state = self._validated(block)
        else:
            source = {k[len(SOURCE) :]: v for k, v in block.items() if k.startswith(SOURCE)}
            state = decode(block, self._plan, self._before)
        self._driver.run(self._executor.advance(state), self._executor.suspends)
        if not self._last:
            return encode(state, self._after) | {SOURCE + n: v for n, v in source.items()}
        return self._output(self._executor.collect(state), source)

    def _validated(self, block: Columns) -> State:
        """Columns of the source that the graph knows; a refused row keeps its place."""
        fields = self._plan.input_schema.fields
        n = row_count(block)
        checked = self._plan.input_schema.from_columns(
            {k: v for k, v in block.items() if k in fields}
        )
        frame = input_frame(checked.columns, len(checked.rows), self._plan.live_input)
        frame.rows = checked.rows
        return State(n, {INPUT: frame}, dict(checked.errors))

    def _output(self, outcome: Outcome, source: Columns) -> Columns:
        _raise_passing(outcome.errors)
        kept = {name: source[name] for name in self._keep}
        if self._attempt is not None:
            return self._committed(self._attempt, outcome, kept, source)
        if outcome.ok:
            columns = outcome.columns | kept
            return columns if self._dead_letters else columns | _no_errors(outcome.n)
        if self._dead_letters:
            failed = np.array(sorted(outcome.errors), dtype=np.int64)
            errors = encode_errors(outcome.errors, outcome.n)[failed]
            write_dead_letters(Path(self._dead_letters), take(source, failed), errors)
            return outcome.columns | take(kept, outcome.rows)
        columns = {}
        for name, values in outcome.columns.items():
            kind = self._plan.output_schema.fields[name]
            spread = np.zeros((outcome.n, *values.shape[1:]), values.dtype)
            if kind.has_gap:
                spread = kind.filled(outcome.n)
            spread[outcome.rows] = values
            columns[name] = spread
        return columns | kept | {ROW_ERROR: encode_errors(outcome.errors, outcome.n)}

    def _committed(
        self, attempt: Attempt, outcome: Outcome, kept: Columns, source: Columns
    ) -> Columns:
        from ray.data.block import BlockAccessor

        positions = source[POSITION]
        answered = failed = None
        if len(outcome.rows):
            good = outcome.columns | take(kept, outcome.rows)
            answered = to_arrow(good)
            if isinstance(answered, dict):
                answered = BlockAccessor.batch_to_arrow_block(answered)
        if outcome.errors:
            rows = np.array(sorted(outcome.errors), dtype=np.int64)
            given = take({k: v for k, v in source.items() if k != POSITION}, rows)
            failed = dead_letter_table(given, encode_errors(outcome.errors, outcome.n)[rows])
        attempt.commit(runs_of(positions), answered, failed)
        return {"rows": np.array([outcome.n])}


def _raise_passing(errors: Mapping[int, RowError]) -> None:
    """Raises RetryLaterError where a row failed for now only: it is no dead letter, and a job that
    is run again asks for it once more."""
    for row_error in errors.values():
        error = error_of(row_error.code, row_error.message)
        if isinstance(error, RetryLaterError):
            raise error


def _no_errors(n: int) -> Columns:
    return {ROW_ERROR: np.full(n, "", dtype=object)}


def dead_letter_table(source: Columns, errors: np.ndarray) -> Any:
    """Failed rows as an Arrow table: their source columns, and ``error_code`` … ``error_field``."""
    import pyarrow as pa

    details = decode_errors(errors)
    columns: dict[str, Any] = {name: list(values) for name, values in source.items()}
    for part in ("code", "message", "node", "field"):
        texts = [getattr(details[i], part) for i in range(len(errors))]
        columns[f"error_{part}"] = pa.array(texts, pa.string())
    return pa.table(columns)


def write_dead_letters(folder: Path, source: Columns, errors: np.ndarray) -> None:
    """Failed rows as one Parquet file; its name is the hash of its content, so that a block
    that Ray runs again writes the same file and no row twice."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(dead_letter_table(source, errors), sink)
    content = sink.getvalue().to_pybytes()
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{hashlib.sha256(content).hexdigest()[:32]}.parquet"
    partial = target.with_suffix(".partial")
    partial.write_bytes(content)
    partial.replace(target)
