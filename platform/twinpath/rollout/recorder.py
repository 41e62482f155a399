"""What a model node calls for each batch: it keeps references, and counts them later in one go.

Counting a batch of a few rows costs as much as counting thousands, so :meth:`Recorder.record`
only appends; the sketches are made when a report is asked for, or when enough rows wait.
"""

import threading
from collections.abc import Iterator, Sequence
from itertools import repeat
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

#: A call that is not counted yet: its scores, its time, the rows that failed, and the segments'
#: columns.
_Batch = tuple[NDArray[Any], float, NDArray[np.bool_] | None, list[NDArray[Any] | None]]


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
        of rows that failed are not looked at; ``errors`` (n,) marks these, and rows with a score
        that is not finite have failed too. A call that failed as a whole has ``errors`` all true
        and any ``scores`` of n rows. ``columns``: the batch, with
        the segment columns in it; one that is absent is counted as ``(other)``. ``latency_s``: the
        time of the call. The arrays are read later, so they must not be written to.
        """
        segments = [columns.get(column) for column in self.segments]
        with self._lock:
            self._waiting.setdefault(version, []).append((scores, latency_s, errors, segments))
            self._rows += len(scores)
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
            scores, times_s, errors, segments = zip(*batches, strict=True)
            sizes = [len(part) for part in scores]
            sketch.latency = sketch.latency + _latencies(times_s)
            index = self._index(scores, errors, sizes)
            sketch.overall.add(_tally(np.bincount(index, minlength=self.bins.count + 1)))
            for column, parts in zip(self.segments, zip(*segments, strict=True), strict=True):
                mine = sketch.segments.setdefault(column, {})
                for value, tally in self._by_value(column, parts, sizes, index):
                    mine.setdefault(value, Tally.empty(self.bins)).add(tally)

    def _index(
        self,
        scores: Sequence[NDArray[Any]],
        errors: Sequence[NDArray[np.bool_] | None],
        sizes: Sequence[int],
    ) -> NDArray[np.int64]:
        """The bin of each row; one past the last bin for a row that failed."""
        flat = np.concatenate([part if part.ndim == 1 else _whole(part) for part in scores])
        index = self.bins.index(flat)
        failed = ~np.isfinite(flat) if flat.dtype.kind == "f" else np.zeros(len(flat), bool)
        if any(part is not None for part in errors):
            failed |= np.concatenate(
                [
                    np.zeros(size, bool) if part is None else part
                    for part, size in zip(errors, sizes, strict=True)
                ]
            )
        return np.where(failed, self.bins.count, index) if failed.any() else index

    def _by_value(
        self,
        column: str,
        parts: Sequence[NDArray[Any] | None],
        sizes: Sequence[int],
        index: NDArray[np.int64],
    ) -> Iterator[tuple[str, Tally]]:
        known = self._codes[column]
        codes = self._coded(known, parts, sizes)
        width = self.bins.count + 1
        size = (self._capacity + 1) * width
        counts = np.bincount(codes * width + index, minlength=size).reshape(-1, width)
        names = [OTHER, *known]
        for code in np.flatnonzero(counts.any(axis=1)).tolist():
            yield names[code], _tally(counts[code])

    def _coded(
        self, known: dict[str, int], parts: Sequence[NDArray[Any] | None], sizes: Sequence[int]
    ) -> NDArray[np.int64]:
        """A number for each row's value: 1 and up in the order they were first seen, 0: other."""
        texts: list[str] = []
        for values, rows in zip(parts, sizes, strict=True):
            texts += [OTHER] * rows if values is None else map(str, values.tolist())
        if len(known) < self._capacity:
            for text in dict.fromkeys(texts):
                if text not in known and text != OTHER and len(known) < self._capacity:
                    known[text] = len(known) + 1
        return np.fromiter(map(known.get, texts, repeat(0)), np.int64, len(texts))


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


def _whole(scores: NDArray[Any]) -> NDArray[Any]:
    """One score for each row, NaN where any number of the row is not finite."""
    flat = scores.reshape(len(scores), -1)
    if flat.dtype.kind != "f":
        return score_of(scores)
    return np.where(np.isfinite(flat).all(axis=1), score_of(scores), np.nan)


def _latencies(times_s: Sequence[float]) -> NDArray[np.int64]:
    bins = np.searchsorted(LATENCY_EDGES_S, np.array(times_s), side="right")
    return np.bincount(bins, minlength=LATENCY_BINS).astype(np.int64)
