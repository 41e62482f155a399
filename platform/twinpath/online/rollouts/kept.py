"""Scores of requests that were answered one after the other, packed into a few arrays.

Objects that are kept for each request would be spread over the heap, and what is made and freed
for later requests with them: a server that keeps three small objects for each of the last 100,000
requests answers a tenth fewer. So a hundred rows or so become one block.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinpath.graph.columns import Notes, PartOfNotes
from twinpath.rollout.recorder import score_of

#: Names of the notes that are kept, as `nodes.registry` writes them.
VERSION, SCORE = "version", "score"


class Fresh:
    """Requests that are not packed yet. Adding one makes no object that stays."""

    __slots__ = ("_batch", "batches", "bounds", "ids", "principals", "rows", "sizes", "starts",
                 "times_s")  # fmt: skip

    def __init__(self) -> None:
        self.rows = 0
        #: Of each request: its id and a line feed, its rows, the first of them in its batch, and
        #: whose request it was.
        self.ids = bytearray()
        self.sizes: list[int] = []
        self.starts: list[int] = []
        self.principals: list[str | None] = []
        #: Of each batch: its notes, when it was answered, and the requests before it.
        self.batches: list[Notes] = []
        self.times_s: list[float] = []
        self.bounds: list[int] = []
        self._batch: Notes | None = None

    def __len__(self) -> int:
        return len(self.sizes)

    def add(
        self,
        request_id: bytes,
        rows: int,
        notes: Notes,
        principal: str | None,
        clock: Callable[[], float],
    ) -> None:
        """Keep a request. Those of one batch come one after the other."""
        batch, start = notes, 0
        if type(notes) is PartOfNotes:
            batch, start = notes.batch, notes.start
        if batch is not self._batch:
            self._batch = batch
            self.batches.append(batch)
            self.times_s.append(clock())
            self.bounds.append(len(self.sizes))
        self.ids += request_id
        self.ids += b"\n"
        self.sizes.append(rows)
        self.starts.append(start)
        self.principals.append(principal)
        self.rows += rows


class Kept:
    """Some requests, in the order in which they were answered. Ids are visible ASCII."""

    __slots__ = ("_ids", "_index", "_nodes", "_starts", "labelled", "principals", "rows", "sizes",
                 "times_s")  # fmt: skip

    def __init__(self, fresh: Fresh) -> None:
        self._ids = bytes(fresh.ids)
        self._index: dict[bytes, int] | None = None
        self.sizes = np.array(fresh.sizes)
        self.principals = fresh.principals
        self.rows = fresh.rows
        #: Positions of requests that have had their labels.
        self.labelled: set[int] = set()
        counts = np.diff([*fresh.bounds, len(fresh)])
        self.times_s = np.repeat(fresh.times_s, counts)
        parts: dict[str, list[tuple[Any, ...]]] = {}
        firsts = [0]
        for batch, stop in zip(fresh.batches, _stops(fresh), strict=True):
            firsts.append(firsts[-1] + max(stop, _scored(batch, firsts[-1], parts)))
        self._starts = np.array(fresh.starts) + np.repeat(firsts[:-1], counts)
        self._nodes = {
            node: tuple(np.concatenate(column) for column in zip(*found, strict=True))
            for node, found in parts.items()
        }

    def __len__(self) -> int:
        return len(self.principals)

    def position(self, request_id: bytes) -> int | None:
        """Where a request is; the last of those that share an id."""
        if self._index is None:
            ids = self._ids.split(b"\n")[:-1]
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


def _stops(fresh: Fresh) -> list[int]:
    """Of each batch, the rows up to the end of its last request."""
    last = [*fresh.bounds[1:], len(fresh)]
    return [fresh.starts[i - 1] + fresh.sizes[i - 1] for i in last]


def _scored(batch: Notes, first: int, parts: dict[str, list[tuple[Any, ...]]]) -> int:
    """Add what nodes noted of a batch, whose first row is ``first`` here; the rows it has."""
    count = 0
    for node, (rows, noted) in batch.items():
        if VERSION in noted and SCORE in noted and noted[SCORE].dtype.kind in "fiub" and len(rows):
            scores = np.asarray(score_of(noted[SCORE]), np.float64)
            parts.setdefault(node, []).append((rows + first, noted[VERSION], scores))
            count = max(count, int(rows[-1]) + 1)
    return count
