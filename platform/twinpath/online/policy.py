"""The batching policy: pure, no clock and no I/O.

A batch leaves at once when a slot is free and grows only while earlier ones run, so there is no
latency tax at low load. With ``max_wait_ms`` a batch that is not full is held that long even
though a slot is free.
"""

from collections import deque
from dataclasses import dataclass, field

from twinpath.graph.placement import Batch


@dataclass(frozen=True, slots=True)
class Waiting:
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


@dataclass(slots=True)
class BatchPolicy:
    """What to run next. ``running`` counts batches under way; never above ``max_inflight``."""

    batch: Batch
    max_inflight: int
    queue: deque[Waiting] = field(default_factory=deque)
    running: int = 0
    queued_rows: int = 0

    def arrived(self, ticket: int, rows: int, now_s: float) -> None:
        """A request joined the queue."""
        self.queue.append(Waiting(ticket, rows, now_s))
        self.queued_rows += rows

    def dropped(self, ticket: int) -> None:
        """A waiting request was cancelled or expired; harmless if it is not waiting."""
        for waiting in self.queue:
            if waiting.ticket == ticket:
                self.queue.remove(waiting)
                self.queued_rows -= waiting.rows
                return

    def finished(self) -> None:
        """A batch came back."""
        self.running -= 1

    def decide(self, now_s: float) -> Dispatch | WakeAt | None:
        """The next instruction; ask again until it is None or WakeAt.

        Requests leave in the order in which they came and are never split: one that is larger
        than ``max_size`` goes alone.
        """
        if not self.queue or self.running >= self.max_inflight:
            return None
        taken, rows = 0, 0
        for waiting in self.queue:
            if taken and rows + waiting.rows > self.batch.max_size:
                break
            taken, rows = taken + 1, rows + waiting.rows
        full = rows >= self.batch.max_size or taken < len(self.queue)
        due_s = self.queue[0].arrived_s + self.batch.max_wait_ms / 1000
        if not full and now_s < due_s:
            return WakeAt(due_s)
        tickets = tuple(self.queue.popleft().ticket for _ in range(taken))
        self.queued_rows -= rows
        self.running += 1
        return Dispatch(tickets)
