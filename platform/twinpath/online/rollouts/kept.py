"""Scores of requests that were answered one after the other, packed into a few arrays.

Objects that are kept for each request would be spread over the heap, and what is made and freed
for later requests with them: a server that keeps three small objects for each of the last 100,000
requests answers a tenth fewer. So a hundred rows or so become one block.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinpath.graph.columns import Notes, PartOfNotes
from twinpath.rollout.recorder import score_of

#: Names of the notes that are kept, as `nodes.registry` writes them.
VERSION, SCORE = "version", "score"

#: The id, the number of rows, their notes, whose request it was, and when it was answered.
Given = tuple[bytes, int, Notes, str | None, float]


class Kept:
    """Some requests, in the order in which they were answered. Ids are visible ASCII."""

    __slots__ = ("_ids", "_index", "_nodes", "_starts", "labelled", "principals", "rows", "sizes",
                 "times_s")  # fmt: skip

    def __init__(self, given: Sequence[Given]) -> None:
        ids, sizes, notes, principals, times_s = zip(*given, strict=True)
        self._ids = b"\n".join(ids)
        self._index: dict[bytes, int] | None = None
        self.sizes = np.array(sizes)
        self.times_s = np.array(times_s)
        self.principals: list[str | None] = list(principals)
        self.rows = sum(sizes)
        #: Positions of requests that have had their labels.
        self.labelled: set[int] = set()
        starts: list[int] = []
        parts: dict[str, list[tuple[Any, ...]]] = {}
        batch: Notes = {}
        first = base = 0
        for mine, size in zip(notes, sizes, strict=True):
            part = type(mine) is PartOfNotes
            if (mine.batch if part else mine) is not batch:
                first, batch = base, mine.batch if part else mine
                base += _scored(batch, first, parts)
            starts.append(first + mine.start if part else first)
            base = max(base, starts[-1] + size)
        self._starts = np.array(starts)
        self._nodes = {
            node: tuple(np.concatenate(column) for column in zip(*found, strict=True))
            for node, found in parts.items()
        }

    def __len__(self) -> int:
        return len(self.principals)

    def position(self, request_id: bytes) -> int | None:
        """Where a request is; the last of those that share an id."""
        if self._index is None:
            ids = self._ids.split(b"\n")
            self._index = {name: position for position, name in enumerate(ids)}
        return self._index.get(request_id)

    def scores(
        self, position: int
    ) -> Iterator[tuple[str, NDArray[np.int64], NDArray[Any], NDArray[np.float64]]]:
        """For each node that scored a request: its name, the rows that it scored, the version that
        did, and the score."""
        start = int(self._starts[position])
        for node, (rows, versions, scores) in self._nodes.items():
            low, high = np.searchsorted(rows, (start, start + int(self.sizes[position])))
            if high > low:
                yield node, rows[low:high] - start, versions[low:high], scores[low:high]


def _scored(batch: Notes, first: int, parts: dict[str, list[tuple[Any, ...]]]) -> int:
    """Add what nodes noted of a batch, whose first row is ``first`` here; the rows it has."""
    count = 0
    for node, (rows, noted) in batch.items():
        if VERSION in noted and SCORE in noted and noted[SCORE].dtype.kind in "fiub" and len(rows):
            scores = np.asarray(score_of(noted[SCORE]), np.float64)
            parts.setdefault(node, []).append((rows + first, noted[VERSION], scores))
            count = max(count, int(rows[-1]) + 1)
    return count
