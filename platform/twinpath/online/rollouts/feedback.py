"""Labels that come later: joined by request id with the scores that were given then.

Model nodes note the version and the score of every row (`graph.columns.NOTE`); the replica that
answered keeps them for a while, and gives them to whoever comes back with the labels.
"""

import math
import time
from collections import OrderedDict
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


@dataclass(slots=True)
class _Given:
    rows: int
    notes: Notes
    principal: str | None
    at_s: float
    labelled: bool = False


class Feedback:
    """The scores of recent requests of one replica, by request id.

    At most ``max_rows`` rows and for ``max_age_s`` seconds; the oldest are forgotten first. What
    a request costs here is one entry of a dict: its arrays are those of the batch.
    """

    def __init__(
        self,
        max_rows: int = 100_000,
        max_age_s: float = 3600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_rows, self._max_age_s, self._clock = max_rows, max_age_s, clock
        self._given: OrderedDict[bytes, _Given] = OrderedDict()
        self._rows = 0

    def __len__(self) -> int:
        return len(self._given)

    @property
    def rows(self) -> int:
        """Rows whose scores are kept."""
        return self._rows

    def remember(self, ask: Ask, outcome: Outcome) -> None:
        """Keep the notes of an outcome. An id that is used again stands for its last request."""
        if not outcome.notes:
            return
        before = self._given.pop(ask.request_id, None)
        if before is not None:
            self._rows -= before.rows
        now_s = self._clock()
        self._given[ask.request_id] = _Given(outcome.n, outcome.notes, ask.principal, now_s)
        self._rows += outcome.n
        self._forget(now_s)

    def join(
        self, request_id: bytes, labels: Sequence[float | None], principal: str | None = None
    ) -> Join | None:
        """The scores of that request with these labels, one for each of its rows in their order
        (None: not known). None if the id is not known here, or was another principal's.

        Raises InputError when the number of labels is not that of the rows.
        """
        self._forget(self._clock())
        given = self._given.get(request_id)
        if given is None or given.principal != principal:
            return None
        if len(labels) != given.rows:
            raise InputError(
                f"{len(labels)} labels for request {request_id.decode('latin-1')!r}, which had "
                f"{given.rows} rows: send one for each row, null where it is not known"
            )
        if given.labelled:
            return Join((), already=True)
        given.labelled = True
        found = []
        for node, (rows, noted) in given.notes.items():
            known = VERSION in noted and SCORE in noted
            if not known or noted[SCORE].dtype.kind not in "fiub":
                continue
            kept = _known(rows, noted[VERSION], noted[SCORE], labels)
            if kept[0]:
                found.append(Labelled(node, *kept))
        return Join(tuple(found))

    def _forget(self, now_s: float) -> None:
        while self._given:
            oldest = next(iter(self._given.values()))
            if self._rows <= self._max_rows and now_s - oldest.at_s <= self._max_age_s:
                return
            self._given.popitem(last=False)
            self._rows -= oldest.rows


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
