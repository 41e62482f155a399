"""Rows pushed to the online store: checked at once, queued within a bound, written behind.

What was accepted is written: while the store is away the rows wait and are tried again, in order,
until they are in or the process ends. When the bound is reached, more is refused (503).
"""

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

from twinpath.errors import BodyTooLargeError, FeatureStoreError, OverloadedError
from twinpath.features.pushed_rows import RowCheck
from twinpath.features.repo import FeatureRepo
from twinpath.features.writing import CHUNK_ROWS, StoreRow, ViewWriter

_LOG = logging.getLogger(__name__)


@dataclass(slots=True)
class PushStatistics:
    """Rows since the start. accepted = written + outdated + waiting."""

    accepted: int = 0
    written: int = 0
    outdated: int = 0
    refused: int = 0
    failures: int = 0


@dataclass(slots=True)
class _Push:
    view: str
    rows: list[StoreRow]
    #: Resolves to the number of rows written, those that were not newer left out.
    done: "Future[int]" = field(default_factory=Future)


class Pusher:
    """Writes rows to views of a repository.

    ``max_rows`` bounds the rows that wait or are being written. After a failure the store is tried
    again after ``first_wait_s`` seconds, then twice as long each time up to ``longest_wait_s``.
    """

    def __init__(
        self,
        repo: FeatureRepo,
        *,
        max_rows: int = 100_000,
        first_wait_s: float = 0.05,
        longest_wait_s: float = 1.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._repo, self._max_rows = repo, max_rows
        self._first_wait_s, self._longest_wait_s = first_wait_s, longest_wait_s
        self._clock = clock
        self._writers: dict[str, tuple[ViewWriter, RowCheck]] = {}
        self._opening = threading.Lock()
        self._queue: deque[_Push] = deque()
        self._changed = threading.Condition()
        self._waiting_rows = 0
        self._closing = False
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self.statistics = PushStatistics()

    @property
    def waiting_rows(self) -> int:
        """Rows that are accepted and not written yet."""
        return self._waiting_rows

    def check(self, view: str, rows: Sequence[Mapping[str, Any]]) -> list[StoreRow]:
        """Rows as the store takes them. Raises InputError that names the first row and column that
        does not fit the view, and ConfigError for a view that is not there."""
        _, checks = self._writer(view)
        return checks.store_rows(rows, self._clock())

    def offer(self, view: str, rows: list[StoreRow]) -> "Future[int]":
        """Accept checked rows; the future tells how many were written, once they are. Raises
        OverloadedError when too many rows wait already, BodyTooLargeError for more than may ever
        wait, FeatureStoreError when it is closed."""
        if len(rows) > self._max_rows:
            raise BodyTooLargeError(
                f"{len(rows)} rows are more than the {self._max_rows} that may wait: push fewer "
                "rows at a time"
            )
        push = _Push(view, rows)
        with self._changed:
            if self._closing:
                raise FeatureStoreError("this server is stopping and accepts no more rows")
            if self._waiting_rows + len(rows) > self._max_rows:
                self.statistics.refused += len(rows)
                raise OverloadedError(
                    f"{self._waiting_rows} pushed rows wait for the feature store, and with these "
                    f"{len(rows)} it would be more than {self._max_rows}: send them again later",
                    self._longest_wait_s,
                )
            self._waiting_rows += len(rows)
            self.statistics.accepted += len(rows)
            self._queue.append(push)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="feature-push", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return push.done

    def close(self, timeout_s: float = 10.0) -> int:
        """Accept nothing more, write what waits for up to ``timeout_s`` seconds; the number of rows
        that could not be written by then, whose futures fail with FeatureStoreError. Serve ends a
        replica 20 s after it asked it to stop: what was lost must be told before."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._waiting_rows == 0, timeout_s)
            left, lost = list(self._queue), self._waiting_rows
            self._queue.clear()
        self._wake.set()
        for push in left:
            _fail(push, FeatureStoreError("the server stopped before these rows could be written"))
        if self._thread is not None:
            self._thread.join(timeout=5)
        if lost:
            _LOG.error("%d pushed rows were not written: the feature store stayed away", lost)
        return lost

    def _writer(self, view: str) -> tuple[ViewWriter, RowCheck]:
        with self._opening:
            found = self._writers.get(view)
            if found is None:
                writer = ViewWriter(self._repo, view)
                found = self._writers[view] = writer, RowCheck(writer)
            return found

    def _run(self) -> None:
        wait_s = self._first_wait_s
        while (pushes := self._next()) is not None:
            rows = [row for push in pushes for row in push.rows]
            try:
                writer, _ = self._writer(pushes[0].view)
                written = writer.write_each(rows)
            except Exception as error:
                self.statistics.failures += 1
                self._stand_back(pushes[0].view)
                if self.statistics.failures == 1 or wait_s >= self._longest_wait_s:
                    _LOG.warning("%d pushed rows wait: %s", self._waiting_rows, error)
                if self._wake.wait(wait_s):
                    return
                wait_s = min(2 * wait_s, self._longest_wait_s)
                continue
            wait_s = self._first_wait_s
            self._written(pushes, written)

    def _stand_back(self, view: str) -> None:
        """Rows of a view that could not be written go behind those of all others, in their order:
        it may be the view that is at fault. What is known of it is looked up anew."""
        with self._opening:
            self._writers.pop(view, None)
        with self._changed:
            mine = [push for push in self._queue if push.view == view]
            self._queue = deque(push for push in self._queue if push.view != view)
            self._queue.extend(mine)

    def _next(self) -> list[_Push] | None:
        """The pushes at the front that are of one view, left in the queue; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._queue) or self._closing)
            if not self._queue:
                return None
            pushes, rows = [self._queue[0]], len(self._queue[0].rows)
            for push in list(self._queue)[1:]:
                rows += len(push.rows)
                if push.view != pushes[0].view or rows > CHUNK_ROWS:
                    break
                pushes.append(push)
            return pushes

    def _written(self, pushes: Sequence[_Push], written: Sequence[bool]) -> None:
        with self._changed:
            for push in pushes:
                if self._queue and self._queue[0] is push:
                    self._queue.popleft()
            self._waiting_rows -= len(written)
            self.statistics.written += sum(written)
            self.statistics.outdated += len(written) - sum(written)
            self._changed.notify_all()
        start = 0
        for push in pushes:
            stop = start + len(push.rows)
            # Whoever waited for it may have given up in the meantime.
            with contextlib.suppress(InvalidStateError):
                push.done.set_result(sum(written[start:stop]))
            start = stop


def _fail(push: _Push, error: Exception) -> None:
    with contextlib.suppress(InvalidStateError):
        push.done.set_exception(error)
