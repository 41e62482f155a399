"""Labels that come later: joined by request id with the scores that were given then.

Model nodes note the version and the score of every row (`graph.columns.NOTE`); the replica that
answered keeps them for a while, and gives them to whoever comes back with the labels.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from twinpath.errors import InputError
from twinpath.graph.columns import Notes, Outcome
from twinpath.online.dataplane import Ask
from twinpath.rollout.recorder import score_of

#: Names of the notes that are kept, as `nodes.registry` writes them.
VERSION, SCORE = "version", "score"


@dataclass(frozen=True, slots=True)
class Labelled:
    """Rows of one node whose labels are known: arrays of the same length."""

    node: str
    versions: list[str]
    scores: list[float]
    labels: list[float]


@dataclass(frozen=True, slots=True)
class Join:
    """What became of one piece of feedback. ``already``: it had been given before, and is not
    counted again."""

    rows: tuple[Labelled, ...]
    already: bool = False


#: The id, the number of rows, their notes, whose request it was, and when it was answered.
_Given = tuple[bytes, int, Notes, str | None, float]


class Feedback:
    """The scores of recent requests of one replica, by request id.

    At most ``max_rows`` rows and for ``max_age_s`` seconds; the oldest are forgotten first. What
    a request costs here is one entry of a list: its arrays are those of the batch, and ids are
    only looked at when the first labels come.
    """

    def __init__(
        self,
        max_rows: int = 100_000,
        max_age_s: float = 3600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_rows, self._max_age_s, self._clock = max_rows, max_age_s, clock
        #: Those whose ids nobody has looked at yet, and those before them.
        self._fresh: deque[_Given] = deque()
        self._read: deque[_Given] = deque()
        self._by_id: dict[bytes, _Given] = {}
        self._labelled: set[bytes] = set()
        self._rows = 0

    def __len__(self) -> int:
        return len(self._fresh) + len(self._read)

    @property
    def rows(self) -> int:
        """Rows whose scores are kept."""
        return self._rows

    def remember(self, ask: Ask, outcome: Outcome) -> None:
        """Keep the notes of an outcome. An id that is used again stands for its last request."""
        notes = outcome.notes
        if not notes:
            return
        self._fresh.append((ask.request_id, outcome.n, notes, ask.principal, self._clock()))
        self._rows += outcome.n
        if self._rows > self._max_rows:
            self._forget()

    def join(
        self, request_id: bytes, labels: Sequence[float | None], principal: str | None = None
    ) -> Join | None:
        """The scores of that request with these labels, one for each of its rows in their order
        (None: not known). None if the id is not known here, or was another principal's.

        Raises InputError when the number of labels is not that of the rows.
        """
        self._forget(self._clock() - self._max_age_s)
        self._look_at_ids()
        given = self._by_id.get(request_id)
        if given is None or given[3] != principal:
            return None
        _, rows, notes, _, _ = given
        if len(labels) != rows:
            raise InputError(
                f"{len(labels)} labels for request {request_id.decode('latin-1')!r}, which had "
                f"{rows} rows: send one for each row, null where it is not known"
            )
        if request_id in self._labelled:
            return Join((), already=True)
        self._labelled.add(request_id)
        found = []
        for node, (noted_rows, noted) in notes.items():
            known = VERSION in noted and SCORE in noted
            if not known or noted[SCORE].dtype.kind not in "fiub":
                continue
            kept = _known(noted_rows, noted[VERSION], noted[SCORE], labels)
            if kept[0]:
                found.append(Labelled(node, *kept))
        return Join(tuple(found))

    def _look_at_ids(self) -> None:
        for given in self._fresh:
            self._by_id[given[0]] = given
            self._labelled.discard(given[0])
        self._read += self._fresh
        self._fresh.clear()

    def _forget(self, before_s: float = -math.inf) -> None:
        """The oldest: those that are too many, and those that were answered before a moment."""
        while oldest := self._read or self._fresh:
            if self._rows <= self._max_rows and oldest[0][4] >= before_s:
                return
            given = oldest.popleft()
            self._rows -= given[1]
            if self._by_id.get(given[0]) is given:
                del self._by_id[given[0]]
                self._labelled.discard(given[0])


def _known(
    rows: Any, versions: Any, scores: Any, labels: Sequence[float | None]
) -> tuple[list[str], list[float], list[float]]:
    """Rows that have a version, a score and a label; notes are of the rows at ``rows``."""
    kept: tuple[list[str], list[float], list[float]] = ([], [], [])
    flat = np.asarray(score_of(scores), np.float64)
    for row, version, score in zip(rows.tolist(), versions.tolist(), flat.tolist(), strict=True):
        label = labels[row]
        if label is not None and version and math.isfinite(score):
            kept[0].append(str(version))
            kept[1].append(score)
            kept[2].append(float(label))
    return kept
