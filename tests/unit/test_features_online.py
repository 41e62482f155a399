"""Reading bounded in time: circuit breaker, deadlines and cache, over a store that obeys."""

import asyncio
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from twinpath.errors import DeadlineError, FeatureStoreError
from twinpath.features import online as module
from twinpath.features.online import BREAKER_FAILURES, OnlineFeatures
from twinpath.features.spec import ServiceSpec, ViewSpec

VIEW = ViewSpec("v", ("k",), {"x": "float64"}, ttl_s=60.0, timestamp_field="at")
SPEC = ServiceSpec("s", (VIEW,), promised=(("v", "x"),))


class Store:
    """A reader in memory that fails or waits when told to."""

    suffix = b""
    ends_in_time = False

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.wait_s = 0.0
        self.asked: list[int] = []
        self.event_us = time.time_ns() // 1000

    async def read(self, wanted):
        self.asked.append(sum(len(want.keys) for want in wanted))
        if self.wait_s:
            await asyncio.sleep(self.wait_s)
        if self.error is not None:
            raise self.error
        value = b"\x29" + np.float64(1.5).tobytes()
        return [[(value, self.event_us) for _ in want.keys] for want in wanted]

    def moments(self, raw):
        return np.array(raw, dtype=np.int64)

    async def close(self):
        pass


@pytest.fixture
def store(monkeypatch) -> Store:
    made = Store()
    monkeypatch.setattr(module, "open_reader", lambda *_: made)
    return made


def opened(**options) -> OnlineFeatures:
    return OnlineFeatures(SimpleNamespace(service=lambda name: SPEC), SPEC, **options)


def keys(*names: str | None):
    return {"k": np.array(names, dtype=object)}


async def test_rows_get_the_values_of_their_keys(store):
    (rows,) = await opened().read(keys("a", None, "a"), None)
    assert rows.found.tolist() == [True, False, True]
    assert rows.values["x"][[0, 2]].tolist() == [1.5, 1.5]
    assert store.asked == [1]


async def test_a_batch_without_any_key_asks_nobody(store):
    (rows,) = await opened().read(keys(None, None), None)
    assert not rows.found.any()
    assert store.asked == []


async def test_a_value_older_than_its_time_to_live_is_not_found(store):
    store.event_us -= 61_000_000
    online = opened()
    (rows,) = await online.read(keys("a"), None)
    assert not rows.found.any()
    assert online.statistics.expired == 1


async def test_time_to_live_counts_to_the_rows_own_moment(store):
    moments = np.array([store.event_us + 59_000_000, store.event_us - 59_000_000])
    store.event_us -= 3600_000_000
    (rows,) = await opened().read(keys("a", "b"), moments - 3600_000_000)
    assert rows.found.tolist() == [True, True]  # a value that came after the moment counts


async def test_a_time_to_live_that_was_applied_since_counts(store):
    store.event_us -= 61_000_000
    online = opened()
    longer = replace(SPEC, views=(replace(VIEW, ttl_s=120.0),))
    online._repo.service = lambda name: longer
    (rows,) = await online.read(keys("a"), None)
    assert rows.found.all()


async def test_after_some_failures_the_store_is_left_alone_then_tried_again(store):
    online = opened()
    online.breaker.reset_timeout = 0.05
    store.error = ConnectionRefusedError("nobody")
    for _ in range(BREAKER_FAILURES):
        with pytest.raises(FeatureStoreError, match="nobody"):
            await online.read(keys("a"), None)
    with pytest.raises(FeatureStoreError, match="in a row"):
        await online.read(keys("a"), None)
    assert len(store.asked) == BREAKER_FAILURES
    store.error = None
    await asyncio.sleep(0.1)
    (rows,) = await online.read(keys("a"), None)
    assert rows.found.all()
    assert online.breaker.current_state == "closed"


async def test_a_store_that_is_late_is_a_failure_that_says_how_late(store):
    store.wait_s = 60.0
    with pytest.raises(FeatureStoreError, match="within 10 ms"):
        await opened(timeout_s=0.01).read(keys("a"), None)


async def test_a_requests_own_short_deadline_is_no_fault_of_the_store(store):
    store.wait_s = 60.0
    online = opened(timeout_s=30.0)
    for _ in range(BREAKER_FAILURES + 1):
        with pytest.raises(DeadlineError):
            await online.read(keys("a"), None, time.monotonic() + 0.01)
    assert online.breaker.current_state == "closed"


async def test_a_deadline_that_has_passed_asks_nobody(store):
    with pytest.raises(DeadlineError):
        await opened().read(keys("a"), None, time.monotonic() - 1)
    assert store.asked == []


async def test_only_keys_that_are_not_held_are_read(store):
    online = opened(max_staleness_s=3600)
    await online.read(keys("a", "b"), None)
    await online.read(keys("b", "c", "c"), None)
    await online.read(keys("a", "b", "c"), None)
    assert store.asked == [2, 1]
    assert online.statistics.cached_entities == 4


async def test_the_cache_is_bounded(store):
    online = opened(max_staleness_s=3600, cache_entities=2)
    (rows,) = await online.read(keys("a", "b", "c", "d"), None)
    assert rows.found.all()
    assert len(online._caches[0]) == 2
