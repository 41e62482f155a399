"""The SQLite reader beside whoever writes: locks, write-ahead logs, a file that is replaced."""

import asyncio
import shutil
import sqlite3
import threading
import time

import numpy as np
import pytest

from twinpath.errors import FeatureStoreError
from twinpath.features.online import OnlineFeatures
from twinpath.features.repo import FeatureRepo
from twinpath.features.sqlite import SqliteReader

GIVEN = {
    "user_id": np.array(["user-1", "user-2"], dtype=object),
    "shop": np.array([0, 1], dtype=np.int64),
}


@pytest.fixture
def repo(sqlite_repo, tmp_path) -> FeatureRepo:
    """A copy, since these tests write to it."""
    folder = tmp_path / "repo"
    shutil.copytree(sqlite_repo, folder)
    return FeatureRepo(folder)


def database(repo: FeatureRepo) -> str:
    return str(repo.store.repo_path / "online.db")


def opened(repo: FeatureRepo, timeout_s: float = 30.0) -> OnlineFeatures:
    return OnlineFeatures(repo, repo.service("types_only"), timeout_s=timeout_s)


async def found(online: OnlineFeatures) -> list[bool]:
    moment = np.full(2, 0)  # long ago: nothing has run out
    (rows,) = await online.read(GIVEN, moment)
    return rows.found.tolist()


def locked(repo: FeatureRepo) -> sqlite3.Connection:
    writer = sqlite3.connect(database(repo), check_same_thread=False, isolation_level=None)
    writer.execute("BEGIN EXCLUSIVE")
    return writer


async def test_a_read_waits_for_a_writer_without_stopping_the_event_loop(repo):
    online = opened(repo)
    writer = locked(repo)
    reading = asyncio.create_task(found(online))
    turns = 0
    while turns < 20:  # the loop goes on turning while the read waits
        await asyncio.sleep(0.005)
        turns += 1
    assert not reading.done()
    threading.Timer(0.1, writer.rollback).start()
    assert await reading == [True, True]
    writer.close()
    await online.close()


async def test_a_writer_that_never_ends_is_an_error_after_the_time_limit(repo):
    online = opened(repo, timeout_s=0.2)
    writer = locked(repo)
    with pytest.raises(FeatureStoreError):
        await found(online)
    writer.rollback()
    writer.close()
    end_s = time.monotonic() + 60
    while True:
        try:
            assert await found(online) == [True, True]
            break
        except FeatureStoreError:
            assert time.monotonic() < end_s
            await asyncio.sleep(0.05)
    await online.close()


async def test_with_a_write_ahead_log_nobody_waits_for_a_writer(repo):
    with sqlite3.connect(database(repo)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
    online = opened(repo)
    writer = sqlite3.connect(database(repo), isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    writer.execute("DELETE FROM shop_types")
    assert await found(online) == [True, True]
    assert online._reader._there is None  # nothing was handed to the thread
    writer.execute("COMMIT")
    assert await found(online) == [False, False]
    writer.close()
    await online.close()


async def test_a_database_that_is_replaced_is_read_anew(repo):
    online = opened(repo)
    assert await found(online) == [True, True]
    other = database(repo) + ".new"
    shutil.copy(database(repo), other)
    with sqlite3.connect(other) as connection:
        connection.execute("DELETE FROM shop_types")
    shutil.move(other, database(repo))
    online._reader._checked_s -= 2  # as if that long had passed
    assert await found(online) == [False, False]
    await online.close()


async def test_a_store_that_was_never_filled_says_what_to_do(repo, tmp_path):
    reader = SqliteReader(tmp_path / "none.db", "shop", [[]], 1.0)
    with pytest.raises(FileNotFoundError, match="twinpath features apply"):
        await reader.read([])


async def test_more_keys_than_a_statement_takes_are_read_in_parts(repo, monkeypatch):
    monkeypatch.setattr("twinpath.features.sqlite.MAX_KEYS", 3)
    names = [f"user-{i}" for i in range(40)]
    online = opened(repo)
    given = {"user_id": np.array(names, dtype=object)}
    (rows,) = await online.read(given, np.zeros(40, dtype=np.int64))
    assert rows.found.all()
    assert rows.values["f64"][39] == pytest.approx(13 + 1)
    await online.close()
