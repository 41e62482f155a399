"""Columns: the batch that every node, edge and runtime works on.

A batch is ``dict[str, np.ndarray]`` in which every array has the same leading length n (rows).
Numbers and booleans are plain numpy arrays, strings are object arrays, tensors have shape
``(n, ...)``. It is Ray Data's own numpy batch format, so nothing is converted offline.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Columns = dict[str, NDArray[Any]]
Rows = NDArray[np.int64]

#: A node may return this column (object array of None, text or RowError) to fail single rows.
ROW_ERROR = "__error__"
#: Columns that a node returns under names with this prefix are no columns of the graph: they go
#: with the outcome to whoever asked, as `Outcome.notes`, such as the version that scored a row.
NOTE = "__note_"

#: Object array of None or text beside a batch's columns: the version of a model that a request asks
#: for, row by row. Only nodes whose ``pins`` is true are given it.
PIN = "__version__"


def row_count(columns: Columns) -> int:
    """Number of rows of a batch; 0 for a batch without columns."""
    for values in columns.values():
        return len(values)
    return 0


def take(columns: Columns, rows: Rows) -> Columns:
    """The given row positions of every column, in that order."""
    return {name: values[rows] for name, values in columns.items()}


def concat(parts: Sequence[Columns]) -> Columns:
    """Batches with the same columns, one after the other. A single part is returned as it is."""
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@lru_cache(maxsize=512)
def _few(n: int) -> Rows:
    rows = np.arange(n)
    rows.flags.writeable = False
    return rows


def positions(n: int) -> Rows:
    """0..n-1, read-only. Small ones are made once: requests of one row are many."""
    return _few(n) if n <= 512 else np.arange(n)


@dataclass(frozen=True, slots=True)
class RowError:
    """Why one row has no answer.

    ``code`` is a code of :mod:`twinpath.errors`; ``node`` the node that failed, if one did;
    ``field`` the input column that was refused, if one was.
    """

    code: str
    message: str
    node: str | None = None
    field: str | None = None


#: What nodes noted, by node: ascending rows, and a column for each note.
Notes = Mapping[str, tuple[Rows, Columns]]


@dataclass(slots=True)
class Outcome:
    """What a run returned: the columns of the rows that succeeded, and the errors of the others.

    #: ``rows`` is ascending, and rows ∪ errors is exactly 0..n-1: no row is ever lost.
    #: ``nodes_s``: seconds that each node took, in the run of a whole plan.
    #: ``remarks``: what nodes say about the answer, by subject; see `twinpath.graph.context`.
    #: ``batch_notes``: what nodes noted of rows; see :attr:`notes`. Of a part of a batch these are
    #: the batch's, in which its own rows begin at ``notes_at``: cutting them costs more than all
    #: else that is done for a request of one row, and most are never read.
    """

    n: int
    columns: Columns
    rows: Rows
    errors: dict[int, RowError]
    nodes_s: dict[str, float] = field(default_factory=dict)
    remarks: dict[str, str] = field(default_factory=dict)
    batch_notes: Notes = field(default_factory=dict)
    notes_at: int | None = None

    @classmethod
    def success(cls, columns: Columns, n: int) -> "Outcome":
        """Every row succeeded."""
        return cls(n, columns, positions(n), {})

    @classmethod
    def failure(cls, error: RowError, n: int) -> "Outcome":
        """Every row failed, with the same error."""
        return cls(n, {}, positions(0), dict.fromkeys(range(n), error))

    @property
    def ok(self) -> bool:
        """Whether every row succeeded."""
        return not self.errors

    @property
    def notes(self) -> Notes:
        """What nodes noted of these rows, by node: ascending rows, and a column for each note."""
        start = self.notes_at
        if start is None:
            return self.batch_notes
        notes: dict[str, tuple[Rows, Columns]] = {}
        for node, (rows, columns) in self.batch_notes.items():
            low, high = np.searchsorted(rows, (start, start + self.n)).tolist()
            kept = {name: values[low:high] for name, values in columns.items()}
            notes[node] = (rows[low:high] - start, kept)
        return notes

    def split(self, sizes: Sequence[int]) -> list["Outcome"]:
        """One outcome for each run of ``sizes[i]`` consecutive rows; the sizes add up to n."""
        parts: list[Outcome] = []
        start = 0
        items = list(self.columns.items())
        remarks, notes, first = self.remarks, self.batch_notes, self.notes_at or 0
        if self.ok:
            for size in sizes:
                stop = start + size
                columns = {name: values[start:stop] for name, values in items}
                at = first + start
                parts.append(Outcome(size, columns, positions(size), {}, {}, remarks, notes, at))
                start = stop
            return parts
        for size in sizes:
            stop = start + size
            low, high = np.searchsorted(self.rows, (start, stop))
            columns = {name: values[low:high] for name, values in items}
            errors = {
                row - start: error for row, error in self.errors.items() if start <= row < stop
            }
            rows = self.rows[low:high] - start
            parts.append(Outcome(size, columns, rows, errors, {}, remarks, notes, first + start))
            start = stop
        return parts


def joined(parts: Sequence[Outcome]) -> Outcome:
    """Outcomes of consecutive rows as one; a part without any good row has no columns."""
    starts = np.cumsum([0, *(part.n for part in parts)])
    rows = np.concatenate([part.rows + s for part, s in zip(parts, starts, strict=False)])
    good = [part.columns for part in parts if len(part.rows)]
    columns = {n: np.concatenate([c[n] for c in good]) for n in good[0]} if good else {}
    errors = {
        int(row + start): error
        for part, start in zip(parts, starts, strict=False)
        for row, error in part.errors.items()
    }
    remarks = {subject: text for part in parts for subject, text in part.remarks.items()}
    notes: dict[str, tuple[Rows, Columns]] = {}
    given = [(part.notes, start) for part, start in zip(parts, starts, strict=False)]
    for node in dict.fromkeys(node for noted, _ in given for node in noted):
        noted = [(noted[node], start) for noted, start in given if node in noted]
        notes[node] = (
            np.concatenate([rows + start for (rows, _), start in noted]),
            concat([kept for (_, kept), _ in noted]),
        )
    return Outcome(
        int(starts[-1]), columns, rows.astype(np.int64), errors, remarks=remarks, batch_notes=notes
    )
