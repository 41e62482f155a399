"""Reads the newest features of a batch: distinct keys once, one round trip, bounded in time."""

import asyncio
import time
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinpath.errors import DeadlineError, FeatureStoreError, MissingExtraError
from twinpath.features.decode import NEVER, Nulls, columns_of
from twinpath.features.keys import Distinct, KeyEncoder
from twinpath.features.repo import FeatureRepo
from twinpath.features.spec import ServiceSpec, ViewSpec
from twinpath.features.store import RawRow, Wanted, group_views, open_reader, slices
from twinpath.graph.columns import Columns

#: After so many failures in a row the store is left alone, and asked again after this time.
BREAKER_FAILURES = 3
BREAKER_RESET_S = 0.25


@dataclass(slots=True)
class ViewRows:
    """The values of one view for n rows.

    #: ``found``: bool (n,), whether a row of the view held at the row's moment. Where it is False,
    #: and where the view has null, values are NaN, NaT, None, or 0 with a mark in ``nulls``.
    #: ``event_us``: int64 (n,), moments of the rows that were found, µs since 1970 (UTC).
    """

    view: ViewSpec
    values: Columns
    found: NDArray[np.bool_]
    event_us: NDArray[np.int64]
    nulls: dict[str, Nulls] = field(default_factory=dict)


@dataclass(slots=True)
class ReadStatistics:
    """What was read since set-up: counts, and the age of features at the last read in seconds."""

    reads: int = 0
    rows: int = 0
    entities: int = 0
    cached_entities: int = 0
    failures: int = 0
    missing: int = 0
    expired: int = 0
    age_mean_s: float = 0.0
    age_max_s: float = 0.0


class OnlineFeatures:
    """Reads one service's stored views online.

    ``timeout_s`` bounds each read; ``max_staleness_s`` lets a row that was read serve for so long
    again (None: never), for at most ``cache_entities`` entities of each group. After
    BREAKER_FAILURES failures in a row the store is not asked for BREAKER_RESET_S seconds.
    """

    def __init__(
        self,
        repo: FeatureRepo,
        spec: ServiceSpec,
        *,
        timeout_s: float = 0.2,
        max_staleness_s: float | None = None,
        cache_entities: int = 100_000,
    ) -> None:
        try:
            import pybreaker
            from cachetools import TTLCache
        except ImportError as error:
            raise MissingExtraError(error.name or "pybreaker", "features") from None
        self._repo, self._spec = repo, spec
        self._groups = group_views(spec.views)
        self._slices = [slices(views) for views in self._groups]
        self._reader = open_reader(repo, self._groups, timeout_s)
        self._encoders = [KeyEncoder(views[0], self._reader.suffix) for views in self._groups]
        self._timeout_s = timeout_s
        self._caches: list[MutableMapping[bytes, RawRow]] | None = None
        if max_staleness_s:
            self._caches = [TTLCache(cache_entities, max_staleness_s) for _ in self._groups]
        self.breaker = pybreaker.CircuitBreaker(
            fail_max=BREAKER_FAILURES,
            reset_timeout=BREAKER_RESET_S,
            exclude=[asyncio.CancelledError],
            throw_new_error_on_trip=False,
        )
        self._open_error = pybreaker.CircuitBreakerError
        #: Reads under way whose callers' deadlines are near.
        self._left: set[asyncio.Future[Any]] = set()
        self.statistics = ReadStatistics()

    @property
    def reader_name(self) -> str:
        """Which reader was chosen: "RedisReader", "SqliteReader" or "FeastReader"."""
        return type(self._reader).__name__

    async def read(
        self, columns: Columns, moment_us: NDArray[np.int64] | None, deadline_s: float | None = None
    ) -> list[ViewRows]:
        """The views' newest values for the keys in ``columns``, in the service's order.

        ``moment_us`` (n,) is when each row asks, for the time to live; None is now. A value that
        came after it counts: the store knows nothing older. ``deadline_s`` is on
        ``time.monotonic``'s clock. Raises FeatureStoreError where the store does not answer, at
        once while it is known to be away, and DeadlineError where the deadline came first.
        """
        distinct = [encoder.distinct(columns) for encoder in self._encoders]
        raw = await self._rows(distinct, deadline_s)
        n = distinct[0].rows if distinct else 0
        now_us = time.time_ns() // 1000
        moments: NDArray[np.int64] | int = now_us
        if moment_us is not None:
            moments = np.where(moment_us == NEVER, now_us, np.minimum(moment_us, now_us))
        self._refresh()
        found: dict[str, ViewRows] = {}
        ages_us: list[NDArray[np.int64]] = []
        for group, rows in enumerate(raw):
            for view, start in self._slices[group]:
                made = self._view(view, rows, start, distinct[group])
                found[view.title] = made
                ages_us.append(self._held(made, moments))
        self.statistics.reads += 1
        self.statistics.rows += n
        self._record_ages(ages_us)
        return [found[view.title] for views in self._groups for view in views]

    async def close(self) -> None:
        """Release connections."""
        await self._reader.close()

    def _refresh(self) -> None:
        """Take times to live from the registry as it was read last. Other columns than at set-up
        would be another service: those take effect with the next set-up."""
        spec = self._repo.service(self._spec.name)
        if spec is self._spec:
            return
        ttls = {view.title: view.ttl_s for view in spec.views}
        self._slices = [
            [(replace(v, ttl_s=ttls.get(v.title, v.ttl_s)), start) for v, start in views]
            for views in self._slices
        ]
        self._spec = spec

    async def _rows(
        self, distinct: Sequence[Distinct], deadline_s: float | None
    ) -> list[Sequence[RawRow]]:
        """Raw rows of each group's distinct keys, from the cache or the store."""
        if self._caches is None:
            wanted = [Wanted(i, keys.keys) for i, keys in enumerate(distinct) if keys.keys]
            answers = iter(await self._ask(wanted, deadline_s)) if wanted else iter(())
            return [next(answers) if keys.keys else () for keys in distinct]
        held = [
            {key: row for key in keys.keys if (row := cache.get(key)) is not None}
            for keys, cache in zip(distinct, self._caches, strict=True)
        ]
        wanted = [
            Wanted(i, missing)
            for i, keys in enumerate(distinct)
            if (missing := [key for key in keys.keys if key not in held[i]])
        ]
        self.statistics.cached_entities += sum(map(len, held))
        if wanted:
            answers = iter(await self._ask(wanted, deadline_s))
            for want in wanted:
                fresh = dict(zip(want.keys, next(answers), strict=True))
                held[want.group].update(fresh)
                self._caches[want.group].update(fresh)
        return [[held[i][key] for key in keys.keys] for i, keys in enumerate(distinct)]

    async def _ask(self, wanted: Sequence[Wanted], deadline_s: float | None) -> list[list[RawRow]]:
        limit_s = self._timeout_s
        left_s = limit_s if deadline_s is None else deadline_s - time.monotonic()
        if left_s <= 0:
            raise DeadlineError("the deadline passed before the features were read")
        self.statistics.entities += sum(len(want.keys) for want in wanted)
        if left_s >= limit_s:
            return await self._guarded(wanted)
        # The read goes on when nobody waits any more: only its end tells how the store is.
        reading = asyncio.ensure_future(self._guarded(wanted))
        self._left.add(reading)
        reading.add_done_callback(self._ended)
        try:
            async with asyncio.timeout(left_s):
                return await asyncio.shield(reading)
        except TimeoutError:
            raise DeadlineError("the deadline passed while the features were read") from None

    def _ended(self, reading: "asyncio.Future[Any]") -> None:
        self._left.discard(reading)
        if not reading.cancelled():
            reading.exception()  # it was counted; whoever waited was told

    async def _guarded(self, wanted: Sequence[Wanted]) -> list[list[RawRow]]:
        """One read, within the time limit, unless the circuit is open."""
        limit_s = self._timeout_s
        try:
            with self.breaker.calling():
                if self._reader.ends_in_time:
                    return await self._reader.read(wanted)
                async with asyncio.timeout(limit_s):
                    return await self._reader.read(wanted)
        except self._open_error:
            self.statistics.failures += 1
            raise FeatureStoreError(
                f"the online store failed {BREAKER_FAILURES} times in a row and is asked again "
                f"within {BREAKER_RESET_S:g} s",
                BREAKER_RESET_S,
            ) from None
        except Exception as error:
            self.statistics.failures += 1
            text = f"no answer within {limit_s * 1000:g} ms" if not str(error) else str(error)
            raise FeatureStoreError(
                f"the online store could not be read: {type(error).__name__}: {text}"
            ) from error

    def _view(
        self,
        view: ViewSpec,
        rows: Sequence[RawRow],
        start: int,
        distinct: Distinct,
    ) -> ViewRows:
        """One view's values for all rows of the batch, decoded for distinct keys."""
        n, place = distinct.rows, distinct.place
        if not rows:
            return ViewRows(view, {}, np.zeros(n, dtype=bool), np.full(n, NEVER))
        at = start + len(view.features)
        event_us = self._reader.moments([row[at] for row in rows])
        found = event_us != NEVER
        if place is not None:
            event_us = event_us[place]
            found = found[place] & (place >= 0)
        values: Columns = {}
        nulls: dict[str, Nulls] = {}
        decoded = columns_of(rows, start, tuple(view.features.values()))
        for name, (column, marks) in zip(view.features, decoded, strict=True):
            if place is not None:
                column, marks = column[place], None if marks is None else marks[place]
            values[name], nulls[name] = column, marks
        return ViewRows(view, values, found, event_us, nulls)

    def _held(self, rows: ViewRows, moments: NDArray[np.int64] | int) -> NDArray[np.int64]:
        """The ages (µs) of the rows that hold at these moments; the others are found no more."""
        statistics, ttl_s = self.statistics, rows.view.ttl_s
        ages = moments - rows.event_us
        if ttl_s is not None:
            held = rows.found & (ages <= ttl_s * 1_000_000)
            statistics.expired += int(np.count_nonzero(rows.found) - np.count_nonzero(held))
            rows.found = held
        count = int(np.count_nonzero(rows.found))
        statistics.missing += len(ages) - count
        return ages if count == len(ages) else ages[rows.found]

    def _record_ages(self, ages_us: Sequence[NDArray[np.int64]]) -> None:
        count = sum(map(len, ages_us))
        if count:
            largest_us = max(int(ages.max()) for ages in ages_us if len(ages))
            mean_us = sum(float(ages.sum(dtype=np.float64)) for ages in ages_us) / count
            self.statistics.age_mean_s = max(0.0, mean_us / 1e6)
            self.statistics.age_max_s = max(0.0, largest_us / 1e6)
