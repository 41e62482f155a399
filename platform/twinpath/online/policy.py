"""The batching policy: pure, no clock and no I/O.

A batch leaves at once when a slot is free and grows only while earlier ones run, so there is no
latency tax at low load. With ``max_wait_ms`` a batch that is not full is held that long even
though a slot is free. Requests of a higher priority leave first; within one, in order.
"""

import enum
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from twinpath.graph.placement import Batch


class Priority(enum.IntEnum):
    """How much a request matters when not all can be served. Low ones are shed first."""

    LOW = 0
    NORMAL = 1
    HIGH = 2


class Waiting(NamedTuple):
    """A request in the queue: its ticket, its number of rows and when it came (seconds)."""

    ticket: int
    rows: int
    arrived_s: float


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Instruction: run these tickets as one batch, now."""

    tickets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WakeAt:
    """Instruction: ask again at this time (seconds), nothing is due before."""

    time_s: float


def _lanes() -> tuple[dict[int, Waiting], ...]:
    return tuple({} for _ in Priority)


@dataclass(slots=True)
class BatchPolicy:
    """What to run next. ``running`` counts batches under way; never above ``max_inflight``."""

    batch: Batch
    max_inflight: int
    #: One queue for each priority, by ticket, in order of arrival.
    lanes: tuple[dict[int, Waiting], ...] = field(default_factory=_lanes)
    running: int = 0
    queued_rows: int = 0

    def arrived(
        self, ticket: int, rows: int, now_s: float, priority: Priority = Priority.NORMAL
    ) -> None:
        """A request joined the queue."""
        self.lanes[priority][ticket] = Waiting(ticket, rows, now_s)
        self.queued_rows += rows

    def dropped(self, ticket: int) -> None:
        """A waiting request was cancelled or expired; harmless if it is not waiting."""
        for lane in self.lanes:
            waiting = lane.pop(ticket, None)
            if waiting is not None:
                self.queued_rows -= waiting.rows
                return

    def finished(self) -> None:
        """A batch came back."""
        self.running -= 1

    def shed_for(self, priority: Priority, excess_rows: int) -> list[int] | None:
        """Tickets to give up so that a request of this priority fits: the lowest first, the
        newest among them first. None when even that would not free ``excess_rows``."""
        chosen: list[int] = []
        for lane in self.lanes[:priority]:
            for waiting in reversed(lane.values()):
                if excess_rows <= 0:
                    break
                chosen.append(waiting.ticket)
                excess_rows -= waiting.rows
        return chosen if excess_rows <= 0 else None

    def decide(self, now_s: float) -> Dispatch | WakeAt | None:
        """The next instruction; ask again until it is None or WakeAt.

        Requests are never split: one that is larger than ``max_size`` goes alone.
        """
        if self.running >= self.max_inflight or not any(self.lanes):
            return None
        taken: list[Waiting] = []
        rows, full = 0, False
        for waiting in self._in_order():
            if taken and rows + waiting.rows > self.batch.max_size:
                full = True
                break
            taken.append(waiting)
            rows += waiting.rows
        if self.batch.max_wait_ms and not full and rows < self.batch.max_size:
            due_s = min(waiting.arrived_s for waiting in taken) + self.batch.max_wait_ms / 1000
            if now_s < due_s:
                return WakeAt(due_s)
        self._leave(len(taken), rows)
        self.running += 1
        return Dispatch(tuple([waiting.ticket for waiting in taken]))

    def top_up(self, rows: int) -> tuple[int, ...]:
        """Tickets that came since a batch of so many rows was decided and still fit into it."""
        if not self.queued_rows:
            return ()
        taken, more = [], 0
        for waiting in self._in_order():
            if rows + more + waiting.rows > self.batch.max_size:
                break
            taken.append(waiting.ticket)
            more += waiting.rows
        self._leave(len(taken), more)
        return tuple(taken)

    def _leave(self, count: int, rows: int) -> None:
        """The first ``count`` in order, of so many rows together, no longer wait."""
        self.queued_rows -= rows
        for lane in reversed(self.lanes):
            if count >= len(lane):
                count -= len(lane)
                lane.clear()
            else:
                for ticket in list(itertools.islice(lane, count)):
                    del lane[ticket]
                return

    def _in_order(self) -> Iterator[Waiting]:
        for lane in reversed(self.lanes):
            yield from lane.values()
