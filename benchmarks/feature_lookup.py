"""Ten features of one view by FeatureLookup, against Feast's client and a raw pipelined read.

A redis-server of its own and a SQLite file hold the same entities. Ways are called in turns, in one
process, on the event loop and with the garbage collection that replicas run with. At the end Redis
is killed under load, and the time from its return to the first answer is taken.
"""

import asyncio
import contextlib
import io
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import uvloop
from rich.console import Console

from benchmarks.report import Row
from twinpath import FeatureLookup
from twinpath.errors import FeatureStoreError
from twinpath.features.keys import KeyEncoder
from twinpath.features.redis import RedisReader
from twinpath.features.repo import FeatureRepo
from twinpath.online.replicas import settle

ENTITIES = 3000
FEATURES = [f"f{i}" for i in range(10)]
#: Calls of one way in one turn, by number of entities.
CALLS = {1: 1500, 32: 1000, 256: 200}
FEAST_CALLS = 300
LIMIT = "limit"


def run(rounds: int, console: Console) -> list[Row]:
    """Medians over alternated rounds of each round's percentiles."""
    with tempfile.TemporaryDirectory(prefix="features-") as scratch, redis_server(scratch) as redis:
        with console.status("writing entities"):
            stores = {
                "redis": make_repo(Path(scratch) / "redis", "redis", redis.address),
                "sqlite": make_repo(Path(scratch) / "sqlite", "sqlite"),
            }
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            seen = runner.run(_measure(stores, redis, max(rounds, 3), console))
            back_s = runner.run(_recovery(stores["redis"], redis, console))
    return _rows(seen, back_s)


def _rows(seen: dict[tuple[str, int], list[list[float]]], back_s: float) -> list[Row]:
    def at(way: str, entities: int, percent: float) -> float:
        return median(float(np.percentile(turn, percent)) for turn in seen[way, entities])

    rows = [
        Row("Redis, 1 entity", "ms (p50)", at("redis", 1, 50), 0.35, LIMIT, "<= 1"),
        Row("Redis, 1 entity", "ms (p99)", at("redis", 1, 99), 1.0, LIMIT, "< 1"),
        Row("Redis, 256 entities", "ms (p99)", at("redis", 256, 99), 5.0, LIMIT, "< 1"),
        Row("SQLite, 32 entities", "ms (p99)", at("sqlite", 32, 99), 1.5, LIMIT, "<= 1"),
    ]
    for percent, targets in ((99, ("<= 2", "<= 0.25")), (50, (None, None))):
        unit = f"ms (p{percent})"
        ours = at("redis", 32, percent)
        rows += [
            Row("Redis, 32 entities, raw", unit, ours, at("raw", 32, percent),
                "pipeline of HMGET by redis-py", targets[0]),
            Row("Redis, 32 entities, Feast", unit, ours, at("feast", 32, percent),
                "get_online_features", targets[1]),
        ]  # fmt: skip
    rows.append(
        Row("answers again after Redis is back", "seconds", back_s, 1.0, LIMIT, "< 1")
    )  # fmt: skip
    return rows


async def _measure(
    stores: dict[str, Path], redis: "RedisServer", rounds: int, console: Console
) -> dict[tuple[str, int], list[list[float]]]:
    """(way, entities) → for each round the milliseconds of its calls."""
    nodes = {name: _node(folder) for name, folder in stores.items()}
    feast = FeatureRepo(stores["redis"])
    raw = _raw_read(redis, feast)
    service = feast.store.get_feature_service("ten")

    async def by_feast(names: list[str]) -> None:
        feast.store.get_online_features(service, [{"user": name} for name in names]).to_dict()

    async def by_raw(names: list[str]) -> None:
        raw(names)

    def by_node(store: str) -> Callable[[list[str]], Awaitable[None]]:
        async def read(names: list[str]) -> None:
            found = await nodes[store].predict({"user": np.array(names, dtype=object)})
            if np.isnan(found["f0"]).any():
                raise SystemExit("a feature was not found: the figures would mean nothing")

        return read

    ways: list[tuple[str, int, int, Callable[[list[str]], Awaitable[None]]]] = [
        *(("redis", n, calls, by_node("redis")) for n, calls in CALLS.items()),
        ("sqlite", 32, CALLS[32], by_node("sqlite")),
        ("raw", 32, CALLS[32], by_raw),
        ("feast", 32, FEAST_CALLS, by_feast),
    ]
    chance = np.random.default_rng(0)
    seen: dict[tuple[str, int], list[list[float]]] = {}
    settle()
    for number in range(rounds + 1):
        for way, entities, calls, read in ways if number % 2 == 0 else reversed(ways):
            with console.status(f"round {number} of {rounds}: {way}, {entities} entities"):
                times = []
                for _ in range(calls):
                    names = [f"user-{i}" for i in chance.integers(0, ENTITIES, entities)]
                    started = time.perf_counter()
                    await read(names)
                    times.append((time.perf_counter() - started) * 1000)
            if number:  # the first round warms up
                seen.setdefault((way, entities), []).append(times)
    for node in nodes.values():
        await node._online.close()
    return seen


def _node(folder: Path) -> FeatureLookup:
    node = FeatureLookup("ten", str(folder))
    node.setup()
    return node


def _raw_read(server: "RedisServer", repo: FeatureRepo) -> Callable[[list[str]], Any]:
    """The same keys and fields through redis-py, without anything made of the answer."""
    import redis

    spec = repo.service("ten")
    encoder = KeyEncoder(spec.views[0], b"bench")
    reader = RedisReader(None, "bench", [spec.views], 1.0)  # type: ignore[arg-type]  # never opened
    fields = reader.fields[0]
    client = redis.Redis("127.0.0.1", server.port)

    def read(names: list[str]) -> Any:
        keys = encoder.distinct({"user": np.array(names, dtype=object)}).keys
        with client.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.hmget(key, fields)
            return pipe.execute()

    return read


async def _recovery(folder: Path, redis: "RedisServer", console: Console) -> float:
    """Seconds from the first PING that a restarted server answers to the first features."""
    node = _node(folder)
    given = {"user": np.array(["user-1", "user-2"], dtype=object)}
    #: When the reads that were answered had begun.
    answered: list[float] = []
    stop, news = asyncio.Event(), asyncio.Event()

    async def ask() -> None:
        while not stop.is_set():
            started_s = time.monotonic()
            with contextlib.suppress(FeatureStoreError):
                await node.predict(given)
                answered.append(started_s)
                news.set()
            await asyncio.sleep(0.002)

    async def until_answered(since_s: float) -> float:
        """When the first read that began after a moment was answered."""
        while not answered or answered[-1] < since_s:
            news.clear()
            await news.wait()
        return time.monotonic()

    times = []
    workers = [asyncio.create_task(ask()) for _ in range(8)]
    with console.status("killing Redis"):
        for _ in range(3):
            await until_answered(time.monotonic())
            await asyncio.to_thread(redis.kill)
            await asyncio.sleep(0.7)
            await asyncio.to_thread(redis.start)
            back_s = time.monotonic()
            times.append(await until_answered(back_s) - back_s)
    stop.set()
    await asyncio.gather(*workers)
    await node._online.close()
    return max(times)


def make_repo(folder: Path, kind: str, address: str = "") -> Path:
    """A repository whose online store has every entity."""
    import pandas as pd
    import polars as pl
    from feast import Entity, FeatureService, FeatureView, Field, FileSource, ValueType
    from feast.types import Float64, String

    folder.mkdir()
    place = f'connection_string: "{address}"' if address else "path: online.db"
    (folder / "feature_store.yaml").write_text(
        "project: bench\nprovider: local\nregistry: registry.db\n"
        f"online_store: {{type: {kind}, {place}}}\nentity_key_serialization_version: 3\n"
    )
    now = datetime.now(UTC).replace(tzinfo=None)
    chance = np.random.default_rng(1)
    names = [f"user-{i}" for i in range(ENTITIES)]
    values = {name: chance.normal(size=ENTITIES) for name in FEATURES}
    table = pl.DataFrame({"user": names, "event_timestamp": [now] * ENTITIES, **values})
    table.write_parquet(folder / "source.parquet")
    user = Entity(name="user", join_keys=["user"], value_type=ValueType.STRING)
    view = FeatureView(
        name="ten_view",
        entities=[user],
        ttl=timedelta(days=365),
        schema=[
            Field(name="user", dtype=String),
            *(Field(name=name, dtype=Float64) for name in FEATURES),
        ],
        source=FileSource(path="source.parquet", timestamp_field="event_timestamp"),
    )
    store = FeatureRepo(folder).store
    store.apply([user, view, FeatureService(name="ten", features=[view])])
    frame = pd.DataFrame({"user": names, "event_timestamp": now, **values})
    with contextlib.redirect_stdout(io.StringIO()):
        store.write_to_online_store("ten_view", frame)
    return folder


class RedisServer:
    """A redis-server on a free port, whose data outlive it."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers. Raises SystemExit where it is not installed."""
        if shutil.which("redis-server") is None:
            raise SystemExit("redis-server is not installed; apt-get install redis-server")
        self._process = subprocess.Popen(
            ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1",
             "--dir", self._folder, "--appendonly", "yes", "--save", ""],
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        while not self._answers():
            time.sleep(0.002)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as client:
                client.sendall(b"PING\r\n")
                return client.recv(16).startswith(b"+PONG")
        except OSError:
            return False

    def kill(self) -> None:
        """End it at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@contextmanager
def redis_server(folder: str) -> Iterator[RedisServer]:
    """A running server, killed at the end."""
    server = RedisServer(folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()
