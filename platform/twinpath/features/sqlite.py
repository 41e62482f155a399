"""Reads Feast's SQLite layout: one ``WHERE entity_key IN (…)`` for each view.

A table ``project_view`` has a row for each entity and feature. Connections of our own are
read-only, so that they never hold up whoever writes; one that finds the database locked tries again
in a thread, where waiting stops nobody.
"""

import asyncio
import sqlite3
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from twinpath.features.decode import NEVER
from twinpath.features.spec import ViewSpec
from twinpath.features.store import RawRow, Wanted, slices

#: More parameters than this go into several statements (SQLite's own limit is 32,766).
MAX_KEYS = 10_000


def database_path(config: Any) -> Path:
    """The database of a Feast configuration."""
    path = Path(config.online_store.path)
    return path if path.is_absolute() or not config.repo_path else Path(config.repo_path) / path


class SqliteReader:
    """See `StoreReader`. A database that stays locked for ``timeout_s`` is an error."""

    suffix = b""
    ends_in_time = False

    def __init__(
        self, path: Path, project: str, groups: Sequence[Sequence[ViewSpec]], timeout_s: float
    ) -> None:
        self._path, self._timeout_s = path, timeout_s
        self._groups = [slices(views) for views in groups]
        self._widths = [sum(len(v.features) + 1 for v in views) for views in groups]
        self._statements = {
            view.name: (
                "SELECT entity_key, feature_name, value, event_ts "
                f"FROM {_quoted(f'{project}_{view.name}')} WHERE entity_key IN "
            )
            for views in groups
            for view in views
        }
        self._here: sqlite3.Connection | None = None
        self._there: sqlite3.Connection | None = None
        self._file = (0, 0)
        self._thread: ThreadPoolExecutor | None = None

    async def read(self, wanted: Sequence[Wanted]) -> list[list[RawRow]]:
        """See `StoreReader`. Raises sqlite3.Error."""
        self._reopen_if_replaced()
        try:
            if self._here is None:
                self._here = self._open(0.0)
            return self._read(self._here, wanted)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="features-sqlite")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._read_patiently, wanted)

    def _read_patiently(self, wanted: Sequence[Wanted]) -> list[list[RawRow]]:
        if self._there is None:
            self._there = self._open(self._timeout_s)
        return self._read(self._there, wanted)

    def _read(self, connection: sqlite3.Connection, wanted: Sequence[Wanted]) -> list[list[RawRow]]:
        return [self._group(connection, want) for want in wanted]

    def _group(self, connection: sqlite3.Connection, want: Wanted) -> list[RawRow]:
        width = self._widths[want.group]
        found: dict[bytes, list[Any]] = {key: [None] * width for key in want.keys}
        for view, start in self._groups[want.group]:
            place = {name: start + i for i, name in enumerate(view.features)}
            moment = start + len(place)
            for begin in range(0, len(want.keys), MAX_KEYS):
                keys = want.keys[begin : begin + MAX_KEYS]
                statement = self._statements[view.name] + _markers(len(keys))
                for key, name, value, event in connection.execute(statement, keys):
                    at = place.get(name)
                    if at is not None:
                        row = found[key]
                        row[at] = value
                        row[moment] = event
        return [found[key] for key in want.keys]

    def moments(self, raw: Sequence[Any]) -> NDArray[np.int64]:
        """See `StoreReader`."""
        return np.array([NEVER if m is None else _moment(m) for m in raw], dtype=np.int64)

    async def close(self) -> None:
        """Close both connections."""
        thread, self._thread = self._thread, None
        if thread is not None:
            await asyncio.get_running_loop().run_in_executor(None, thread.shutdown)
        for connection in (self._here, self._there):
            if connection is not None:
                connection.close()
        self._here = self._there = None

    def _open(self, patience_s: float) -> sqlite3.Connection:
        if not self._path.is_file():
            raise FileNotFoundError(
                f"no online store at {self._path}: run twinpath features apply, then materialize"
            )
        stat = self._path.stat()
        self._file = (stat.st_ino, stat.st_dev)
        self._checked_s = time.monotonic()
        return sqlite3.connect(
            f"file:{quote(str(self._path))}?mode=ro",
            uri=True,
            timeout=patience_s,
            check_same_thread=False,
            isolation_level=None,
        )

    def _reopen_if_replaced(self) -> None:
        """A database that was written anew is another file of that name: seen within a second."""
        now_s = time.monotonic()
        if self._here is None or now_s - self._checked_s < 1.0:
            return
        self._checked_s = now_s
        try:
            stat = self._path.stat()
        except FileNotFoundError:
            stat = None
        if stat is None or (stat.st_ino, stat.st_dev) != self._file:
            self._here.close()
            self._here = None
            self._there = None


@lru_cache(maxsize=4096)
def _markers(n: int) -> str:
    return "(" + ",".join("?" * n) + ")"


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


@lru_cache(maxsize=65536)
def _moment(stored: Any) -> int:
    """A stored event timestamp as µs since 1970.

    Feast writes seconds since 1970, computed as if the UTC moment were local time.
    """
    if isinstance(stored, str):
        moment = datetime.fromisoformat(stored)
    else:
        moment = datetime.fromtimestamp(stored)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return round(moment.timestamp() * 1_000_000)
