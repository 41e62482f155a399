"""The load test of a challenger: a closed loop against incumbent and challenger, in one process.

Both versions go through the whole graph and its batcher, in turns of a second or so, so that what
else the machine does falls on both. A version is timed as its users would wait for it.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from twinpath.errors import ConfigError
from twinpath.graph.columns import Columns, row_count, take
from twinpath.graph.plan import Plan
from twinpath.graph.stage import Executor
from twinpath.nodes.pinned import pinned, registry_step
from twinpath.online.batcher import Batcher

#: A difference of so many milliseconds is not one that users notice.
NOTICEABLE_MS = 2.0


@dataclass(frozen=True, slots=True)
class Served:
    """One version under load. Times are of requests, milliseconds; ``failed`` counts rows."""

    version: str
    requests: int
    p50_ms: float
    p99_ms: float
    rows_per_s: float
    failed: int


@dataclass(frozen=True, slots=True)
class LoadReport:
    """Both versions, and whether the challenger passed."""

    incumbent: Served
    challenger: Served
    clients: int
    rows: int
    passed: bool
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(slots=True)
class _Times:
    version: str
    executor: Executor
    batcher: Batcher
    seconds: list[float] = field(default_factory=list)
    busy_s: float = 0.0
    rows: int = 0
    failed: int = 0

    def served(self) -> Served:
        times_ms = np.array(self.seconds) * 1000
        return Served(
            self.version, len(times_ms), float(np.percentile(times_ms, 50)),
            float(np.percentile(times_ms, 99)), self.rows / self.busy_s, self.failed,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class LoadTest:
    """``LoadTest(plan, columns, "2", "3").run()``.

    ``columns`` are rows of the graph's input, already checked, that are asked in turn, ``rows`` in
    a request, by ``clients`` that each wait for their answer. The challenger passes if none of its
    rows fails that the incumbent answers, and its 99th percentile is at most ``ratio`` times that
    of the incumbent (or less than `NOTICEABLE_MS` above it).
    """

    plan: Plan
    columns: Columns
    incumbent: str
    challenger: str
    model: str | None = None
    clients: int = 8
    rows: int = 8
    seconds: float = 5.0
    ratio: float = 1.5
    turns: int = 5
    clock: Callable[[], float] = time.perf_counter

    def run(self) -> LoadReport:
        """Measure. Raises ConfigError without rows, and what loading a version raises."""
        if row_count(self.columns) < 1:
            raise ConfigError("a load test needs rows to ask: the source has none that fit")
        step = registry_step(self.plan, self.model)
        executors = {}
        try:
            for version in (self.incumbent, self.challenger):
                executors[version] = Executor(
                    pinned(self.plan, step, version), offload_after_ms=10.0
                )
                executors[version].setup()
            before, now = asyncio.run(self._measure(executors))
        finally:
            for executor in executors.values():
                executor.teardown()
        reason = self._reason(before, now)
        return LoadReport(before, now, self.clients, self.rows, not reason, reason)

    async def _measure(self, executors: dict[str, Executor]) -> tuple[Served, Served]:
        sides = [
            _Times(version, executor, Batcher(executor.run, self.plan.placement.batch))
            for version, executor in executors.items()
        ]
        for side in sides:  # the first calls compile and allocate
            await self._turn(side, min(0.5, self.seconds / 10))
            side.seconds.clear()
            side.busy_s, side.rows, side.failed = 0.0, 0, 0
        for turn in range(self.turns):
            for side in sides if turn % 2 == 0 else sides[::-1]:
                await self._turn(side, self.seconds / self.turns / 2)
        first, second = (side.served() for side in sides)
        return first, second

    async def _turn(self, side: _Times, seconds: float) -> None:
        started_s = self.clock()
        total = row_count(self.columns)

        async def client(number: int) -> None:
            at = number * self.rows
            while True:
                rows = np.arange(at, at + self.rows) % total
                at += self.clients * self.rows
                asked_s = self.clock()
                outcome = await side.batcher.submit(take(self.columns, rows))
                now_s = self.clock()
                side.seconds.append(now_s - asked_s)
                side.rows += self.rows
                side.failed += len(outcome.errors)
                if now_s - started_s > seconds:
                    return
                await asyncio.sleep(0)

        await asyncio.gather(*(client(number) for number in range(self.clients)))
        side.busy_s += self.clock() - started_s

    def _reason(self, before: Served, now: Served) -> str:
        if now.failed * before.requests > before.failed * now.requests:
            return (
                f"{now.failed} rows failed in {now.requests} requests, and {before.failed} in "
                f"{before.requests} of version {before.version}"
            )
        limit_ms = max(before.p99_ms * self.ratio, before.p99_ms + NOTICEABLE_MS)
        if now.p99_ms > limit_ms:
            return (
                f"the 99th percentile is {now.p99_ms:.2f} ms, and that of version "
                f"{before.version} {before.p99_ms:.2f} ms: over {self.ratio:g} times as much"
            )
        return ""
