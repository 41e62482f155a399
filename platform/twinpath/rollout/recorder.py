"""What a model node calls for each batch: it keeps references, and counts them later in one go.

Counting a batch of a few rows costs as much as counting thousands, so :meth:`Recorder.record`
only appends; the sketches are made when a report is asked for, or when enough rows wait.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinpath.graph.columns import Columns
from twinpath.rollout.bins import LATENCY_BINS, LATENCY_EDGES_S, Bins
from twinpath.rollout.sketch import OTHER, Report, Sketch, Tally

#: Rows that wait uncounted; more are counted at once, so memory is bounded.
WAITING_ROWS = 1_024
#: Values of a segment column that are kept apart.
SEGMENT_VALUES = 32


@dataclass(slots=True)
class _Batch:
    rows: int
    scores: NDArray[Any]
    latency_s: float
    errors: NDArray[np.bool_] | None
    segments: tuple[NDArray[Any] | None, ...]


class Recorder:
    """Counts what the versions of one node answer. Calls may come from several threads.

    ``segments`` are input columns whose values are counted apart: the first ``capacity`` values
    of each that are seen, all others as ``(other)``.
    """

    def __init__(
        self,
        segments: Sequence[str] = (),
        bins: Bins | None = None,
        capacity: int = SEGMENT_VALUES,
    ) -> None:
        self.segments = tuple(segments)
        self.bins = bins or Bins()
        self._capacity = capacity
        self._codes: dict[str, dict[str, int]] = {column: {} for column in self.segments}
        self._waiting: dict[str, list[_Batch]] = {}
        self._rows = 0
        self._report = Report(self.bins)
        self._lock = threading.Lock()

    def record(
        self,
        version: str,
        scores: NDArray[Any],
        columns: Columns,
        latency_s: float,
        errors: NDArray[np.bool_] | None = None,
    ) -> None:
        """Count one call of one version; mirrored calls too.

        ``scores``: shape (n,), or (n, k) of which :func:`score_of` takes one for each row. Scores
        of rows that failed are not looked at; ``errors`` (n,) marks these. A call that failed as a
        whole has ``errors`` all true and any ``scores`` of n rows. ``columns``: the batch, with
        the segment columns in it; one that is absent is counted as ``(other)``. ``latency_s``: the
        time of the call. The arrays are read later, so they must not be written to.
        """
        segments = tuple(columns.get(column) for column in self.segments)
        batch = _Batch(len(scores), scores, latency_s, errors, segments)
        with self._lock:
            self._waiting.setdefault(version, []).append(batch)
            self._rows += batch.rows
            if self._rows >= WAITING_ROWS:
                self._count()

    @property
    def waiting_rows(self) -> int:
        """Rows that are recorded and not yet counted."""
        return self._rows

    def drain(self) -> Report:
        """What was counted since the last call."""
        with self._lock:
            self._count()
            report, self._report = self._report, Report(self.bins)
        return report

    def _count(self) -> None:
        waiting, self._waiting, self._rows = self._waiting, {}, 0
        for version, batches in waiting.items():
            sketch = self._report.versions.setdefault(version, Sketch.empty(self.bins))
            sketch.latency = sketch.latency + _latencies(batches)
            index = self._index(batches)
            sketch.overall.add(_tally(np.bincount(index, minlength=self.bins.count + 1)))
            for at, column in enumerate(self.segments):
                parts = [(batch.segments[at], batch.rows) for batch in batches]
                mine = sketch.segments.setdefault(column, {})
                for value, tally in self._by_value(column, parts, index):
                    mine.setdefault(value, Tally.empty(self.bins)).add(tally)

    def _index(self, batches: list[_Batch]) -> NDArray[np.int64]:
        """The bin of each row; one past the last bin for a row that failed."""
        index = self.bins.index(np.concatenate([score_of(batch.scores) for batch in batches]))
        if all(batch.errors is None for batch in batches):
            return index
        failed = [
            np.zeros(batch.rows, bool) if batch.errors is None else batch.errors
            for batch in batches
        ]
        return np.where(np.concatenate(failed), self.bins.count, index)

    def _by_value(
        self, column: str, parts: list[tuple[NDArray[Any] | None, int]], index: NDArray[np.int64]
    ) -> Iterator[tuple[str, Tally]]:
        known = self._codes[column]
        codes = np.concatenate([self._coded(known, values, rows) for values, rows in parts])
        width = self.bins.count + 1
        size = (self._capacity + 1) * width
        counts = np.bincount(codes * width + index, minlength=size).reshape(-1, width)
        names = [OTHER, *known]
        for code in np.flatnonzero(counts.any(axis=1)).tolist():
            yield names[code], _tally(counts[code])

    def _coded(
        self, known: dict[str, int], values: NDArray[Any] | None, rows: int
    ) -> NDArray[np.int64]:
        """A number for each row's value: 1 and up in the order they were first seen, 0: other."""
        if values is None:
            return np.zeros(rows, np.int64)
        texts = [str(value) for value in values.tolist()]
        if len(known) < self._capacity:
            for text in dict.fromkeys(texts):
                if text not in known and text != OTHER and len(known) < self._capacity:
                    known[text] = len(known) + 1
        return np.array([known.get(text, 0) for text in texts], np.int64)


def score_of(scores: NDArray[Any]) -> NDArray[Any]:
    """One score for each row: of shape (n, 2) the second, as the probability of the positive
    class; of (n, k) the largest; (n,) and (n, 1) as they are."""
    if scores.ndim == 1:
        return scores
    flat = scores.reshape(len(scores), -1)
    if flat.shape[1] <= 2:
        return flat[:, -1]
    return np.asarray(flat.max(axis=1))


def _tally(outcomes: NDArray[np.int64]) -> Tally:
    return Tally(outcomes[:-1].astype(np.int64), int(outcomes[-1]))


def _latencies(batches: list[_Batch]) -> NDArray[np.int64]:
    times = np.array([batch.latency_s for batch in batches])
    bins = np.searchsorted(LATENCY_EDGES_S, times, side="right")
    return np.bincount(bins, minlength=LATENCY_BINS).astype(np.int64)
