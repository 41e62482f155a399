"""A source whose rows have positions, for jobs that resume: read in pieces, done rows left out."""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from twinpath.errors import BatchJobError
from twinpath.offline.checkpoint import FOLDER, Runs, runs_of

if TYPE_CHECKING:
    from ray.data import Dataset

#: Source column with a row's position; it travels with the row to the commit of its batch.
POSITION = "__position__"
#: At most so many pieces of one row group: each piece decodes the group up to its last row.
PIECES_PER_GROUP = 8


@dataclass(frozen=True)
class SourceFile:
    """One Parquet file. ``fingerprint`` is the hash of its footer, which holds the offsets, sizes
    and statistics of all its column chunks; of the whole file where we wrote it ourselves."""

    path: str
    rows: int
    fingerprint: str
    first: int


@dataclass(frozen=True)
class Piece:
    """Rows of one row group: ``todo`` are ranges of positions, the group begins at ``first``."""

    path: str
    group: int
    first: int
    todo: list[list[int]]


class PositionedSource:
    """Parquet files; or a CSV file, DataFrame or Arrow table, which is copied to Parquet once.

    Rows are numbered through the files in the order of their paths. Raises BatchJobError for a
    source without lasting positions (a Ray Dataset).
    """

    def __init__(self, source: Any, sink: Path) -> None:
        self.files = self._files(source, sink)
        self.rows = sum(file.rows for file in self.files)

    @property
    def identity(self) -> list[dict[str, Any]]:
        """What tells this source from another one: names, rows and fingerprints."""
        return [
            {"file": Path(f.path).name, "rows": f.rows, "fingerprint": f.fingerprint}
            for f in self.files
        ]

    @property
    def names(self) -> list[str]:
        """The columns' names."""
        import pyarrow.parquet as pq

        return list(pq.read_schema(self.files[0].path).names) if self.files else []

    def pieces(self, done: np.ndarray, wanted: int) -> list[Piece]:
        """About ``wanted`` pieces that hold every row not ``done`` (bool of (rows,))."""
        import pyarrow.parquet as pq

        size = max(1, -(-self.rows // max(1, wanted)))
        found = []
        for file in self.files:
            first, metadata = file.first, pq.read_metadata(file.path)
            for group in range(metadata.num_row_groups):
                rows = metadata.row_group(group).num_rows
                step = max(size, -(-rows // PIECES_PER_GROUP))
                for start in range(first, first + rows, step):
                    stop = min(start + step, first + rows)
                    todo = runs_of(start + np.flatnonzero(~done[start:stop]))
                    if todo:
                        found.append(Piece(file.path, group, first, [list(run) for run in todo]))
                first += rows
        return found

    def _files(self, source: Any, sink: Path) -> list[SourceFile]:
        import pyarrow as pa
        import pyarrow.csv

        if isinstance(source, (str, Path)):
            path = Path(source).absolute()
            if not path.exists():
                raise BatchJobError(f"source {str(source)!r} does not exist")
            if path.suffix != ".csv":
                return _numbered(_parquet_files(path))
            return [_copied(pyarrow.csv.read_csv(path), sink)]
        if hasattr(source, "iloc") and hasattr(source, "columns"):
            return [_copied(pa.Table.from_pandas(source, preserve_index=False), sink)]
        if isinstance(source, pa.Table):
            return [_copied(source, sink)]
        raise BatchJobError(
            f"a job with resume=True cannot read {type(source).__name__}: its rows have no lasting "
            "positions. Write it to Parquet first, and give that path"
        )


def read_pieces(pieces: Any) -> Iterator[Any]:
    """Rows of an Arrow table of pieces as Arrow tables, with the column ``__position__``."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for piece in pieces.to_pylist():
        last = piece["todo"][-1][1]
        first = piece["first"]
        with pq.ParquetFile(piece["path"]) as file:
            for batch in file.iter_batches(row_groups=[piece["group"]]):
                positions = np.arange(first, first + batch.num_rows)
                wanted = _within(positions, [(a, b) for a, b in piece["todo"]])
                first += batch.num_rows
                if wanted.any():
                    table = pa.Table.from_batches([batch]).filter(pa.array(wanted))
                    yield table.append_column(POSITION, pa.array(positions[wanted]))
                if first >= last:
                    break


def dataset_of(data: Any, pieces: list[Piece], num_cpus: float) -> "Dataset":
    """The pieces' rows as a Ray Dataset."""
    described = data.from_items(
        [asdict(piece) for piece in pieces], override_num_blocks=len(pieces)
    )
    return described.map_batches(
        read_pieces, batch_size=None, batch_format="pyarrow", num_cpus=num_cpus
    )


def _within(positions: np.ndarray, runs: Runs) -> np.ndarray:
    wanted = np.zeros(len(positions), dtype=bool)
    for start, stop in runs:
        low, high = np.searchsorted(positions, (start, stop))
        wanted[low:high] = True
    return wanted


def _parquet_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    inside = (file for file in path.rglob("*.parquet") if file.is_file())
    files = sorted(
        file
        for file in inside
        if not any(part.startswith(("_", ".")) for part in file.relative_to(path).parts)
    )
    if not files:
        raise BatchJobError(f"source {str(path)!r} holds no .parquet file")
    return files


def _numbered(paths: list[Path]) -> list[SourceFile]:
    import pyarrow.parquet as pq

    files: list[SourceFile] = []
    first = 0
    for path in paths:
        rows = pq.read_metadata(path).num_rows
        files.append(SourceFile(str(path), rows, _footer_hash(path), first))
        first += rows
    return files


def _footer_hash(path: Path) -> str:
    """SHA-256 of a Parquet file's footer: its length is in 4 bytes before the closing magic."""
    with path.open("rb") as file:
        file.seek(-8, 2)
        length = int.from_bytes(file.read(4), "little")
        file.seek(-8 - length, 2)
        return hashlib.sha256(file.read(length)).hexdigest()


def _copied(table: Any, sink: Path) -> SourceFile:
    """A copy beside the sink, named by the hash of its content."""
    import pyarrow.parquet as pq

    folder = sink / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "source.partial"
    pq.write_table(table, partial)
    with partial.open("rb") as file:
        fingerprint = hashlib.file_digest(file, "sha256").hexdigest()
    target = partial.replace(folder / f"source-{fingerprint[:16]}")
    return SourceFile(str(target), table.num_rows, fingerprint, 0)
