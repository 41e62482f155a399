"""Scores of requests that were answered one after the other, packed into a few arrays.

Objects that are kept for each request would be spread over the heap, and what is made and freed
for later requests with them: a server that keeps three small objects for each of the last 100,000
requests answers a tenth fewer. So a few hundred rows become one block.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinpath.graph.columns import Columns, Notes, Rows
from twinpath.rollout.recorder import score_of

#: Names of the notes that are kept, as `nodes.registry` writes them.
VERSION, SCORE = "version", "score"

#: A request that is not packed yet: its id, whose it was, when it came, its rows, the first of
#: them in its batch, and what nodes noted of the batch.
Fresh = tuple[bytes, str | None, float, int, int, Notes]


class Kept:
    """Some requests, in the order in which they were answered; those of one batch come one after
    the other. Ids are visible ASCII."""

    __slots__ = ("_ids", "_index", "_nodes", "_starts", "labelled", "principals", "rows", "sizes",
                 "times_s")  # fmt: skip

    def __init__(self, fresh: Sequence[Fresh]) -> None:
        ids, self.principals, times_s, sizes, starts, notes = zip(*fresh, strict=True)
        self._ids = b"\n".join(ids)
        self._index: dict[bytes, int] | None = None
        self.times_s = np.array(times_s)
        self.sizes = np.array(sizes)
        self.rows = int(self.sizes.sum())
        #: Positions of requests that have had their labels.
        self.labelled: set[int] = set()
        same = np.fromiter(map(id, notes), np.uint64, len(notes))
        bounds = [0, *(np.flatnonzero(same[1:] != same[:-1]) + 1).tolist(), len(notes)]
        parts: dict[str, list[_Part]] = {}
        firsts = [0]
        for begin, end in pairwise(bounds):
            stop = _scored(notes[begin], firsts[-1], parts)
            firsts.append(firsts[-1] + max(stop, starts[end - 1] + sizes[end - 1]))
        self._starts = np.array(starts) + np.repeat(firsts[:-1], np.diff(bounds))
        self._nodes = {node: _joined(found) for node, found in parts.items()}

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


#: What a node noted of a batch: rows, versions, scores, and the rows that come before the batch.
_Part = tuple[Rows, NDArray[Any], NDArray[Any], int]


def _scored(batch: Notes, first: int, parts: dict[str, list[_Part]]) -> int:
    """Add what nodes noted of a batch, whose first row is ``first`` here; the rows it has."""
    count = 0
    for node, (rows, noted) in batch.items():
        scores = _of(noted)
        if scores is not None and len(rows):
            parts.setdefault(node, []).append((rows, noted[VERSION], scores, first))
            count = max(count, int(rows[-1]) + 1)
    return count


def _of(noted: Columns) -> NDArray[Any] | None:
    """The scores among notes, if they are numbers and have a version."""
    scores = noted.get(SCORE)
    if scores is None or VERSION not in noted or scores.dtype.kind not in "fiub":
        return None
    return scores if scores.ndim == 1 else score_of(scores)


def _joined(parts: list[_Part]) -> tuple[Rows, NDArray[Any], NDArray[np.float64]]:
    rows, versions, scores, firsts = zip(*parts, strict=True)
    offsets = np.repeat(firsts, [len(each) for each in rows])
    return (
        np.concatenate(rows) + offsets,
        np.concatenate(versions),
        np.concatenate(scores).astype(np.float64),
    )
