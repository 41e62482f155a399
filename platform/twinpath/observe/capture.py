"""Captures the rows that a node saw, for later comparison: bounded, and off the event loop.

Rows are appended to Parquet files in a folder, one process beside another. The oldest files of a
process go when it has written more than it may keep. Rows that come faster than they can be written
are dropped and counted: capturing never holds up a request.
"""

import contextlib
import json
import logging
import os
import random
import threading
import time
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinpath.errors import ConfigError
from twinpath.graph.columns import ROW_ERROR, Columns, concat, row_count

_LOG = logging.getLogger(__name__)
#: The column of the rows' moments: int64, µs since 1970 (UTC).
MOMENT = "__moment__"
#: Key of the file's metadata that says, in JSON, what was captured.
ABOUT = b"twinpath.capture"
#: At most so many rows wait to be written.
_WAITING_ROWS = 100_000
_FILES = 8


class Recorder:
    """Appends batches to ``folder`` as Parquet.

    ``about`` is written into every file as JSON. ``max_bytes`` bounds what this process keeps on
    disk; ``share`` is the share of batches that are captured, by chance; every ``flush_s`` seconds,
    and at the end, what waits is written.
    """

    def __init__(
        self,
        folder: Path | str,
        about: Mapping[str, Any],
        *,
        max_bytes: int = 64 * 2**20,
        share: float = 1.0,
        flush_s: float = 1.0,
    ) -> None:
        if not 0 < share <= 1:
            raise ConfigError(f"share={share!r} of batches to capture: expected over 0, at most 1")
        self._folder = Path(folder)
        self._about, self._max_bytes, self._share = dict(about), max_bytes, share
        self._flush_s = flush_s
        self._chance = random.Random()
        self._waiting: deque[Columns] = deque()
        # Each is counted by one thread only, so no lock is needed to tell how many wait.
        self._taken_rows = self._flushed_rows = 0
        self._written: deque[tuple[Path, int]] = deque()
        self._name = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._count = 0
        self._stop = threading.Event()
        self._lock = threading.Lock()
        #: Batches that were not captured because too many waited, or the disk refused them.
        self.dropped = 0
        self._thread = threading.Thread(target=self._run, name="capture", daemon=True)
        self._thread.start()

    def record(self, given: Columns, moments: NDArray[np.int64] | None, made: Columns) -> None:
        """Take a batch of n rows: what a node was given, each row's moment (None: now), and what
        it made of them. The arrays must not change afterwards. Returns at once."""
        if self._share < 1 and self._chance.random() >= self._share:
            return
        n = row_count(given)
        if self._taken_rows - self._flushed_rows + n > _WAITING_ROWS:
            self.dropped += 1
            return
        if moments is None:
            moments = np.full(n, time.time_ns() // 1000)
        batch = {**given, **made, MOMENT: moments}
        batch.pop(ROW_ERROR, None)
        self._taken_rows += n
        self._waiting.append(batch)

    def flush(self) -> None:
        """Write what waits. Called from the background thread; harmless from another."""
        with self._lock:
            batches = [self._waiting.popleft() for _ in range(len(self._waiting))]
            if not batches:
                return
            self._flushed_rows += sum(len(batch[MOMENT]) for batch in batches)
            try:
                self._write(concat(batches))
            except Exception:
                self.dropped += len(batches)
                _LOG.warning(
                    "captured rows could not be written to %s", self._folder, exc_info=True
                )

    def close(self) -> None:
        """Write what waits and end."""
        self._stop.set()
        self._thread.join(timeout=10)
        self.flush()

    def _run(self) -> None:
        while not self._stop.wait(self._flush_s):
            self.flush()

    def _write(self, columns: Columns) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._folder.mkdir(parents=True, exist_ok=True)
        arrays = {name: pa.array(_plain(values)) for name, values in columns.items()}
        table = pa.table(arrays).replace_schema_metadata({ABOUT: json.dumps(self._about)})
        path = self._folder / f"{self._name}-{self._count:06d}.parquet"
        self._count += 1
        partial = path.with_suffix(".partial")
        pq.write_table(table, partial)
        partial.replace(path)
        self._written.append((path, path.stat().st_size))
        self._bound()

    def _bound(self) -> None:
        """Join small files into one, and let the oldest go."""
        if len(self._written) > _FILES * 8:
            self._join([self._written.popleft()[0] for _ in range(_FILES * 8)])
        while len(self._written) > 1 and sum(size for _, size in self._written) > self._max_bytes:
            with contextlib.suppress(FileNotFoundError):
                self._written.popleft()[0].unlink()

    def _join(self, paths: Sequence[Path]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        there = [path for path in paths if path.exists()]
        if not there:
            return
        table = pa.concat_tables([pq.read_table(path) for path in there], promote_options="default")
        target = there[0].with_name(there[0].stem + "j.parquet")
        partial = target.with_suffix(".partial")
        pq.write_table(table, partial)
        partial.replace(target)
        for path in there:
            path.unlink(missing_ok=True)
        self._written.appendleft((target, target.stat().st_size))


def read_capture(folder: Path | str) -> tuple[dict[str, Any], Any]:
    """What was captured and the rows, as an Arrow table. Raises ConfigError when there is nothing,
    or when the files are of different captures."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted(Path(folder).glob("*.parquet"))
    if not files:
        raise ConfigError(
            f"no captured rows in {folder}: switch capturing on with args.features.capture of a "
            "served graph"
        )
    tables = [pq.read_table(file) for file in files]
    abouts = {(table.schema.metadata or {}).get(ABOUT, b"") for table in tables}
    if len(abouts) != 1 or b"" in abouts:
        raise ConfigError(
            f"{folder} holds captures of {len(abouts)} kinds: expected one, as a capture writes it"
        )
    return json.loads(abouts.pop()), pa.concat_tables(tables, promote_options="default")


def _plain(values: NDArray[Any]) -> Any:
    """What Arrow takes: NumPy columns as they are, objects as a list."""
    return values.tolist() if values.dtype == object else values
