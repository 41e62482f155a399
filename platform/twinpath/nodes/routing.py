"""Which version scores which row: pins first, then the rollout's split, then what serves."""

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinpath.errors import UnknownModelError
from twinpath.graph.columns import NOTE, ROW_ERROR, Columns, RowError, Rows, row_count, take
from twinpath.registry.slots import Slots
from twinpath.rollout.bins import Bins
from twinpath.rollout.mirror import MirrorBudget
from twinpath.rollout.recorder import Recorder
from twinpath.rollout.sketch import Report
from twinpath.rollout.split import Split

#: Rows kept of what was asked, to warm up with, and how often they are taken anew.
RECENT_ROWS = 32
RECENT_EVERY_S = 10.0
_MIRROR_NICE = 10


@dataclass(frozen=True)
class Route:
    """How rows are shared out; without a split all go to what serves."""

    split: Split | None = None
    incumbent: str | None = None
    challenger: str | None = None
    rollout: str = ""
    segments: tuple[str, ...] = ()
    bins: Bins | None = None


class Router:
    """Scores batches for one node. ``slots`` is set once, before the first batch."""

    slots: Slots

    def __init__(
        self,
        outputs: tuple[str, ...],
        version_column: str | None,
        segments: tuple[str, ...],
        record: bool,
    ) -> None:
        self._outputs, self._version_column = outputs, version_column
        self._segments = segments
        self._route = Route()
        self._recorder = Recorder(segments) if record else None
        self._recent: Columns | None = None
        self._recent_s = 0.0
        self._budget = MirrorBudget()
        self._budget_lock = threading.Lock()
        self._mirror = ThreadPoolExecutor(1, "twinpath-mirror", initializer=_step_back)

    def close(self) -> None:
        """Mirror nothing any more."""
        self._mirror.shutdown(wait=False, cancel_futures=True)

    def route(self, route: Route) -> None:
        """Share rows out like this from now on. Another rollout is recorded from its start."""
        before, self._route = self._route, route
        if self._recorder is None:
            return
        if route.split is None:
            if before.split is not None:
                self._recorder = Recorder(self._segments)
        elif (route.rollout, route.segments, route.bins) != (
            before.rollout, before.segments, before.bins,
        ):  # fmt: skip
            self._recorder = Recorder(route.segments, route.bins)

    def recent(self) -> Columns | None:
        """Some rows that were asked lately."""
        return self._recent

    def drain(self) -> Report:
        """What was recorded since the last call; nothing, where nothing is recorded."""
        return Report(Bins()) if self._recorder is None else self._recorder.drain()

    def mirrored(self) -> dict[str, int]:
        """Rows that the challenger scored without answering, and those it was not given."""
        return {"mirrored": self._budget.mirrored, "dropped": self._budget.dropped}

    def score(self, columns: Columns, pins: NDArray[Any] | None = None) -> Columns:
        """The node's columns for n rows; a pin that cannot be served fails its own row."""
        now_s = time.monotonic()
        if now_s - self._recent_s > RECENT_EVERY_S:
            self._recent_s = now_s
            self._recent = {n: v[:RECENT_ROWS].copy() for n, v in columns.items()}
        route = self._route
        if pins is None and route.split is None:
            return self._scored(None, columns)
        n = row_count(columns)
        parts = list(self._parts(route, columns, pins, n))
        if len(parts) == 1:
            version, _, fallback = parts[0]
            return self._safely(version, columns, fallback)
        answer: Columns = {}
        failed: NDArray[Any] | None = None
        for version, rows, fallback in parts:
            try:
                found = self._safely(version, take(columns, rows), fallback)
            except UnknownModelError as error:
                failed = np.full(n, None, object) if failed is None else failed
                failed[rows] = RowError(error.code, error.message)
                continue
            for name, values in found.items():
                if name not in answer:
                    answer[name] = np.zeros((n, *values.shape[1:]), values.dtype)
                answer[name][rows] = values
        if failed is not None:
            if not answer:
                raise UnknownModelError(str(failed[0].message))
            answer[ROW_ERROR] = failed
        return answer

    def _parts(
        self, route: Route, columns: Columns, pins: NDArray[Any] | None, n: int
    ) -> Iterator[tuple[str | None, Rows, bool]]:
        """Version, its rows, and whether what serves steps in when it fails. They cover 0..n-1."""
        free = np.ones(n, bool)
        if pins is not None:
            texts = np.array([pin or "" for pin in pins.tolist()], object)
            for pin in sorted(set(texts.tolist()) - {""}):
                mine = texts == pin
                free &= ~mine
                yield pin, np.flatnonzero(mine), False
        challenger = route.challenger
        if route.split is not None and challenger is not None and self.slots.live(challenger):
            masks = route.split.parts(columns)
            mine = masks.challenger & free
            if mine.any():
                yield challenger, np.flatnonzero(mine), True
                free &= ~mine
            copied = masks.mirrored & free
            if copied.any():
                self._copy(challenger, columns, np.flatnonzero(copied))
        if free.any():
            yield None, np.flatnonzero(free), False

    def _safely(self, version: str | None, columns: Columns, fallback: bool) -> Columns:
        """A challenger that raises harms nobody: it is counted, and what serves answers."""
        if not fallback:
            return self._scored(version, columns)
        with contextlib.suppress(Exception):
            return self._scored(version, columns, whole=True)
        return self._scored(None, columns)

    def _scored(self, version: str | None, columns: Columns, whole: bool = False) -> Columns:
        """One call of one version. ``whole``: count all rows as failed when it raises; a batch that
        is halved and asked again is counted when one row is left."""
        recorder, n = self._recorder, row_count(columns)
        with self.slots.use(version) as slot:
            started_s = time.perf_counter()
            try:
                answer = slot.live.predict(columns)
            except Exception:
                if recorder is not None and (whole or n == 1):
                    spent_s = time.perf_counter() - started_s
                    recorder.record(slot.version, np.zeros(n), columns, spent_s, np.ones(n, bool))
                raise
            spent_s = time.perf_counter() - started_s
        if recorder is None and self._version_column is None:
            return answer
        versions = np.empty(n, object)
        versions.fill(slot.version)
        if self._version_column is not None:
            answer[self._version_column] = versions
        if recorder is not None:
            scores = answer[self._outputs[0]]
            if scores.dtype.kind in "fiub":
                recorder.record(slot.version, scores, columns, spent_s)
            # With these, labels that come later find the version and the score that they are for.
            answer[f"{NOTE}version"] = versions
            answer[f"{NOTE}score"] = scores
        return answer

    def _copy(self, challenger: str, columns: Columns, rows: Rows) -> None:
        """Let the challenger score copies, if it has kept up with those before."""
        with self._budget_lock:
            if not self._budget.admit(len(rows)):
                return
        self._mirror.submit(self._mirrored, challenger, take(columns, rows))

    def _mirrored(self, challenger: str, columns: Columns) -> None:
        try:
            with contextlib.suppress(Exception):
                self._scored(challenger, columns, whole=True)
        finally:
            with self._budget_lock:
                self._budget.done(row_count(columns))


def _step_back() -> None:
    """Mirrored work goes behind everything else on the machine."""
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _MIRROR_NICE)
