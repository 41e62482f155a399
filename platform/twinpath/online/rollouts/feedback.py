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

from twinpath.errors import InputError
from twinpath.graph.columns import Outcome
from twinpath.online.dataplane import Ask
from twinpath.online.rollouts.kept import Fresh, Kept

#: Blocks that are kept; the oldest is forgotten as a whole.
BLOCKS = 256


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


class Feedback:
    """The scores of recent requests of one replica, by request id.

    At most ``max_rows`` rows, a block less where the oldest were just forgotten, and for
    ``max_age_s`` seconds; they are forgotten a block at a time.
    """

    def __init__(
        self,
        max_rows: int = 100_000,
        max_age_s: float = 3600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_rows, self._max_age_s, self._clock = max_rows, max_age_s, clock
        self._block_rows = max(1, max_rows // BLOCKS)
        #: Those that are not packed yet, and blocks of those before them.
        self._fresh: list[Fresh] = []
        self._fresh_rows = 0
        self._blocks: deque[Kept] = deque()
        self._rows = 0

    def __len__(self) -> int:
        return len(self._fresh) + sum(map(len, self._blocks))

    @property
    def rows(self) -> int:
        """Rows whose scores are kept."""
        return self._rows + self._fresh_rows

    def remember(self, ask: Ask, outcome: Outcome) -> None:
        """Keep the notes of an outcome. An id that is used again stands for its last request."""
        notes = outcome.batch_notes
        if not notes:
            return
        n = outcome.n
        self._fresh.append(
            (ask.request_id, ask.principal, ask.started_s, n, outcome.notes_at or 0, notes)
        )
        self._fresh_rows += n
        if self._fresh_rows >= self._block_rows:
            self._pack()

    def join(
        self, request_id: bytes, labels: Sequence[float | None], principal: str | None = None
    ) -> Join | None:
        """The scores of that request with these labels, one for each of its rows in their order
        (None: not known). None if the id is not known here, or was another principal's.

        Raises InputError when the number of labels is not that of the rows.
        """
        self._pack()
        for block in reversed(self._blocks):
            position = block.position(request_id)
            if position is not None:
                break
        else:
            return None
        too_old = self._clock() - float(block.times_s[position]) > self._max_age_s
        if too_old or block.principals[position] != principal:
            return None
        rows = int(block.sizes[position])
        if len(labels) != rows:
            raise InputError(
                f"{len(labels)} labels for request {request_id.decode('latin-1')!r}, which had "
                f"{rows} rows: send one for each row, null where it is not known"
            )
        if position in block.labelled:
            return Join((), already=True)
        block.labelled.add(position)
        found = []
        for node, scored, versions, scores in block.scores(position):
            kept = _known(scored, versions, scores, labels)
            if kept[0]:
                found.append(Labelled(node, *kept))
        return Join(tuple(found))

    def _pack(self) -> None:
        """Make a block of what is fresh; forget the oldest, too many or too old."""
        if self._fresh:
            self._blocks.append(Kept(self._fresh))
            self._rows += self._fresh_rows
            self._fresh, self._fresh_rows = [], 0
        # Those that are fresh until the next time count, too.
        most = self._max_rows - (self._block_rows - 1)
        before_s = self._clock() - self._max_age_s
        while self._blocks and (self._rows > most or self._blocks[0].times_s[-1] < before_s):
            self._rows -= self._blocks.popleft().rows


def _known(
    rows: Any, versions: Any, scores: Any, labels: Sequence[float | None]
) -> tuple[list[str], list[float], list[float]]:
    """Rows that have a version, a score and a label; notes are of the rows at ``rows``."""
    kept: tuple[list[str], list[float], list[float]] = ([], [], [])
    for row, version, score in zip(rows.tolist(), versions.tolist(), scores.tolist(), strict=True):
        label = labels[row]
        if label is not None and version and math.isfinite(score):
            kept[0].append(str(version))
            kept[1].append(score)
            kept[2].append(float(label))
    return kept
