"""Which rows of a source are done: what lets a killed job go on, with each row exactly once.

A row's identity is its position in the source. A batch that was scored is committed by one
rename: its Parquet file carries the positions of all its rows, those that failed too, in its
metadata. So the sink itself is the record, and no second one can disagree with it.

    sink/_checkpoint/manifest.json     what the job is: graph, output, source
    sink/run-0001/000…0-1f3a.parquet   one committed batch
    sink/run-0001/_000…8-77c2.rows     a committed batch of which every row failed
    dead_letters/run-0001/000…0-1f3a.parquet

Each attempt writes into a folder of its own, ``run-0002.open``. The next attempt renames it before
it looks what is done: a worker of the old one that is still alive finds its folder gone and can
commit nothing more. A batch's dead letters are written before its commit, and those without one
are removed by the next attempt.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from twinpath.errors import BatchJobError

#: Folder in the sink; readers of Parquet folders skip names that begin with an underscore.
FOLDER = "_checkpoint"
#: Key in a file's metadata: the positions of the batch's rows, as text.
ROWS_KEY = b"twinpath.rows"
_OPEN = ".open"
_EMPTY = ".rows"
_PARTIAL = ".partial"

Runs = list[tuple[int, int]]


def runs_of(positions: Iterable[int]) -> Runs:
    """Distinct positions, in any order, as ascending half-open ranges."""
    ordered = np.sort(np.asarray(list(positions), dtype=np.int64))
    if not len(ordered):
        return []
    breaks = np.flatnonzero(np.diff(ordered) != 1) + 1
    return [(int(part[0]), int(part[-1]) + 1) for part in np.split(ordered, breaks)]


def to_text(runs: Runs) -> str:
    """``[(0, 3), (5, 6)]`` as ``0-3,5-6``."""
    return ",".join(f"{start}-{stop}" for start, stop in runs)


def from_text(text: str) -> Runs:
    """The ranges that :func:`to_text` wrote."""
    pairs = (part.split("-") for part in text.split(",") if part)
    return [(int(start), int(stop)) for start, stop in pairs]


@dataclass(frozen=True)
class Attempt:
    """Where one attempt at a job commits its batches; goes with the actors.

    Raises BatchJobError from :meth:`commit` when a later attempt has taken the job over.
    """

    sink: Path
    dead_letters: Path

    def commit(self, rows: Runs, output: Any, failed: Any) -> None:
        """Commit one batch: its answered rows and its failed ones as Arrow tables, or None."""
        text = to_text(rows)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        stem = f"{rows[0][0]:015d}-{digest}" if rows else f"none-{digest}"
        try:
            dead = self.dead_letters / f"{stem}.parquet"
            if failed is not None:
                _write_table(dead, failed)
            else:
                dead.unlink(missing_ok=True)
            if output is not None:
                metadata = {**(output.schema.metadata or {}), ROWS_KEY: text.encode()}
                _write_table(
                    self.sink / f"{stem}.parquet", output.replace_schema_metadata(metadata)
                )
            else:
                _write(self.sink / f"_{stem}{_EMPTY}", text.encode())
        except FileNotFoundError:
            raise BatchJobError(
                f"{self.sink} is gone: another attempt at this job has begun and took it over"
            ) from None


class Checkpoint:
    """The record of a job in its sink. :meth:`begin` an attempt, :meth:`finish` it."""

    def __init__(self, sink: Path, dead_letters: Path) -> None:
        self.sink, self.dead_letters = sink, dead_letters
        self._manifest = sink / FOLDER / "manifest.json"

    @property
    def exists(self) -> bool:
        """Whether a resumable job was begun in this sink."""
        return self._manifest.exists()

    def begin(self, identity: Mapping[str, Any]) -> Attempt:
        """End earlier attempts and open a new one.

        ``identity`` (plain JSON values) says what the job is. Raises BatchJobError when the sink
        was begun by a job that differs, or holds something else.
        """
        identity = json.loads(json.dumps(identity))
        if self.exists:
            self._compare(json.loads(self._manifest.read_text()), identity)
        else:
            self._check_unused()
            self._manifest.parent.mkdir(parents=True, exist_ok=True)
            _write(self._manifest, json.dumps(identity, indent=1).encode())
        self.finish()
        names = [path.name for path in self.sink.glob("run-*")]
        number = 1 + max((int(name[4:].split(".")[0]) for name in names), default=0)
        name = f"run-{number:04d}{_OPEN}"
        try:
            (self.dead_letters / name).mkdir(parents=True)
            (self.sink / name).mkdir()
        except FileExistsError:
            raise BatchJobError(
                f"another attempt at this job began in {self.sink} at the same moment: "
                "let one run at a time"
            ) from None
        return Attempt(self.sink / name, self.dead_letters / name)

    def finish(self) -> None:
        """Close every attempt that is open: nothing can be committed to it afterwards."""
        for folder in self.sink.glob(f"run-*{_OPEN}"):
            _close(folder)
        for folder in self.dead_letters.glob(f"run-*{_OPEN}"):
            closed = _close(folder)
            committed = {_stem(file) for file in _commits(self.sink / closed.name)}
            for file in closed.glob("*.parquet"):
                if file.stem not in committed:
                    file.unlink()
        # The sink's folders stay, empty or not: their numbers must not be used again.
        for folder in self.dead_letters.glob("run-*"):
            if not any(folder.iterdir()):
                folder.rmdir()
        if self.dead_letters.exists() and not any(self.dead_letters.iterdir()):
            self.dead_letters.rmdir()

    def done(self, total_rows: int) -> "np.ndarray[Any, np.dtype[np.bool_]]":
        """For each of the source's rows, whether its batch is committed; bool of (total_rows,)."""
        mask = np.zeros(total_rows, dtype=bool)
        for folder in self.sink.glob("run-*"):
            for file in _commits(folder):
                for start, stop in _committed_rows(file):
                    mask[start:stop] = True
        return mask

    def _compare(self, begun: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        for key in sorted({*begun, *now}):
            if begun.get(key) != now.get(key):
                raise BatchJobError(
                    f"{self.sink} was begun by a job with another {key}: there it is "
                    f"{_short(begun.get(key))}, here {_short(now.get(key))}. Choose another sink, "
                    "or pass overwrite=True to start afresh"
                )

    def _check_unused(self) -> None:
        for folder in (self.sink, self.dead_letters):
            if folder.exists() and any(path.name != FOLDER for path in folder.iterdir()):
                raise BatchJobError(
                    f"{folder} is not empty and was not begun with resume=True: choose another "
                    "sink, or pass overwrite=True to replace what is there"
                )


def _close(folder: Path) -> Path:
    closed = folder.with_name(folder.name.removesuffix(_OPEN))
    folder.rename(closed)
    for file in closed.glob(f"*{_PARTIAL}"):
        file.unlink()
    return closed


def _commits(folder: Path) -> Iterator[Path]:
    yield from folder.glob("*.parquet")
    yield from folder.glob(f"_*{_EMPTY}")


def _stem(file: Path) -> str:
    return file.stem.removeprefix("_")


def _committed_rows(file: Path) -> Runs:
    import pyarrow.parquet as pq

    if file.suffix == _EMPTY:
        return from_text(file.read_text())
    text = (pq.read_schema(file).metadata or {}).get(ROWS_KEY)
    if text is None:
        raise BatchJobError(
            f"{file} says not which rows it holds: something else wrote it; move it elsewhere"
        )
    return from_text(text.decode())


def _write_table(target: Path, table: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    _write(target, memoryview(sink.getvalue()))


def _write(target: Path, content: bytes | memoryview) -> None:
    """The file is there whole or not at all. Raises FileNotFoundError when its folder is gone."""
    partial = target.with_name(f"_{target.name}.{os.getpid()}{_PARTIAL}")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(target)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
