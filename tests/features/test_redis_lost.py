"""Redis is killed and comes back under load: nobody hangs, and reads go on by themselves."""

import asyncio
import contextlib
import signal
import time
from collections.abc import Iterator

import numpy as np
import pytest

from tests.features.conftest import Redis
from tests.features.shop import make_repo
from twinpath.errors import DeadlineError, FeatureStoreError
from twinpath.features.online import OnlineFeatures
from twinpath.features.redis import Address, RedisReader
from twinpath.features.repo import FeatureRepo
from twinpath.features.spec import ViewSpec
from twinpath.features.store import Wanted
from twinpath.graph.context import collect_remarks
from twinpath.nodes.features import FeatureLookup

TIMEOUT_S = 0.5
#: More than any read may take on a busy machine, and far less than a hung one would.
HUNG_S = 30.0


@pytest.fixture(scope="module")
def own_redis(tmp_path_factory):
    server = Redis(tmp_path_factory.mktemp("redis-lost"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def repo(tmp_path_factory, own_redis):
    store = f'{{type: redis, connection_string: "{own_redis.address}"}}'
    return make_repo(tmp_path_factory.mktemp("lost") / "repo", store)


@pytest.fixture
def running(own_redis):
    if own_redis.process is None:
        own_redis.start()
    return own_redis


def given(i: int) -> dict[str, np.ndarray]:
    return {
        "user_id": np.array([f"user-{i % 20}", f"user-{(i + 1) % 20}"], dtype=object),
        "shop": np.array([i % 3 - 1, 0], dtype=np.int64),
    }


async def load(read, until: asyncio.Event, log: list, workers: int = 8) -> None:
    """Reads one after the other from each worker; every outcome is logged with its time."""

    async def worker(number: int) -> None:
        turn = number
        while not until.is_set():
            started_s = time.monotonic()
            try:
                async with asyncio.timeout(HUNG_S):
                    what = await read(given(turn))
            except FeatureStoreError:
                what = "error"
            log.append((time.monotonic(), time.monotonic() - started_s, what))
            turn += workers
            await asyncio.sleep(0.002)

    await asyncio.gather(*(worker(i) for i in range(workers)))


async def until_seen(log: list, what: str, since: int) -> None:
    end_s = time.monotonic() + 60
    while not any(entry[2] == what for entry in log[since:]):
        assert time.monotonic() < end_s, f"no {what!r} within a minute"
        await asyncio.sleep(0.005)


async def kill_and_return(redis: Redis, log: list, bad: str) -> None:
    await until_seen(log, "ok", 0)
    await asyncio.to_thread(redis.kill)
    await until_seen(log, bad, len(log))
    gone = len(log)
    await asyncio.sleep(0.3)
    assert all(what != "ok" for _, _, what in log[gone + 8 :]), "no server, and yet an answer"
    await asyncio.to_thread(redis.start)
    await until_seen(log, "ok", len(log))


def test_errors_come_at_once_while_it_is_away_and_reads_go_on_after_its_return(running, repo):
    features = FeatureRepo(repo)
    online = OnlineFeatures(features, features.service("all"), timeout_s=TIMEOUT_S)
    log: list = []

    async def read(columns) -> str:
        views = await online.read(columns, None)
        assert len(views[0].found) == 2
        return "ok"

    async def story() -> None:
        stop = asyncio.Event()
        running_load = asyncio.create_task(load(read, stop, log))
        try:
            await kill_and_return(running, log, "error")
        finally:
            stop.set()
            await running_load
            await online.close()

    asyncio.run(story())
    assert {what for _, _, what in log} == {"ok", "error"}
    assert online.statistics.failures > 8


def test_answers_are_degraded_while_it_is_away_when_told_to(running, repo):
    node = FeatureLookup(
        "all", str(repo), on_failure="degrade", defaults={"spent": -1.0}, timeout_ms=TIMEOUT_S * 1e3
    )
    node.setup()
    log: list = []

    async def read(columns) -> str:
        remarks = collect_remarks()
        made = await node.predict(columns)
        degraded = remarks.get("features") == "degraded"
        if degraded:
            assert (made["spent"] == -1.0).all()
        return "degraded" if degraded else "ok"

    async def story() -> None:
        stop = asyncio.Event()
        running_load = asyncio.create_task(load(read, stop, log))
        try:
            await kill_and_return(running, log, "degraded")
        finally:
            stop.set()
            await running_load

    asyncio.run(story())
    node.teardown()
    assert {what for _, _, what in log} == {"ok", "degraded"}


@contextlib.contextmanager
def standing_still(redis: Redis) -> Iterator[None]:
    """A server that holds its connections and answers nothing."""
    redis.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        redis.process.send_signal(signal.SIGCONT)


def test_a_server_that_stands_still_is_not_waited_for(running, repo):
    features = FeatureRepo(repo)
    online = OnlineFeatures(features, features.service("all"), timeout_s=TIMEOUT_S)

    async def story() -> None:
        await online.read(given(1), None)
        with standing_still(running), pytest.raises(FeatureStoreError):
            async with asyncio.timeout(HUNG_S):
                await online.read(given(1), None)
        end_s = time.monotonic() + 60
        while time.monotonic() < end_s:
            try:
                await online.read(given(1), None)
                break
            except FeatureStoreError:
                await asyncio.sleep(0.05)
        else:
            pytest.fail("reads did not go on")
        await online.close()

    asyncio.run(story())


async def paused(redis: Redis, ms: int) -> None:
    """All commands of all clients wait so long, in a server that is well otherwise."""
    reader, writer = await asyncio.open_connection("127.0.0.1", redis.port)
    writer.write(f"CLIENT PAUSE {ms} ALL\r\n".encode())
    assert (await reader.readline()).startswith(b"+OK")
    writer.close()


def test_one_short_deadline_harms_no_neighbour(running, repo):
    features = FeatureRepo(repo)
    online = OnlineFeatures(features, features.service("all"), timeout_s=5.0)

    async def story() -> None:
        await online.read(given(1), None)
        await paused(running, 300)
        near_s = time.monotonic() + 0.1
        reads = [online.read(given(i), None, near_s if i == 2 else None) for i in range(5)]
        found = await asyncio.gather(*reads, return_exceptions=True)
        assert isinstance(found.pop(2), DeadlineError)
        assert [len(views[0].found) for views in found] == [2] * 4
        assert online.breaker.fail_counter == 0
        assert online.statistics.failures == 0
        await online.read(given(3), None)
        await online.close()

    asyncio.run(story())


def test_a_store_that_hangs_is_left_alone_though_every_deadline_came_first(running, repo):
    features = FeatureRepo(repo)
    online = OnlineFeatures(features, features.service("all"), timeout_s=TIMEOUT_S)

    async def story() -> None:
        await online.read(given(1), None)
        outcomes = []
        with standing_still(running):
            end_s = time.monotonic() + 60
            while FeatureStoreError not in outcomes:
                assert time.monotonic() < end_s, outcomes
                try:
                    await online.read(given(1), None, time.monotonic() + TIMEOUT_S / 5)
                except (DeadlineError, FeatureStoreError) as error:
                    outcomes.append(type(error))
        assert outcomes[0] is DeadlineError
        await online.close()

    asyncio.run(story())


async def test_connecting_and_reading_have_the_limit_together():
    """A server that takes most of the time to log in, and then says nothing more."""
    limit_s = 1.0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"secret\r\n")
        await asyncio.sleep(limit_s * 0.8)
        writer.write(b"+OK\r\n")
        await reader.read()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    view = ViewSpec("v", ("k",), {"x": "float64"}, None, "at")
    reader = RedisReader(Address("127.0.0.1", port, password="secret"), "p", [[view]], limit_s)
    started_s = time.monotonic()
    with pytest.raises(TimeoutError):
        await reader.read([Wanted(0, (b"key",))])
    assert time.monotonic() - started_s < limit_s * 1.6
    await reader.close()
    server.close()
