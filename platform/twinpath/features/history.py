"""What held at given moments: the point-in-time join of views' sources with a batch of keys.

For a row that asks at moment m, a view gives the values with the latest event timestamp t <= m;
of rows with the same key and t the one that was created last; nothing when m - t is over the
view's time to live. That is Feast's rule (``get_historical_features``), in columns: one sort and
one merge by moment instead of a join of every pair.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinpath.errors import ConfigError, MissingExtraError, did_you_mean
from twinpath.features.decode import NEVER, Nulls, from_objects
from twinpath.features.online import ViewRows
from twinpath.features.rows import RowMaker
from twinpath.features.spec import ViewSpec
from twinpath.graph.columns import Columns

#: A source up to this size in memory is read whole, once in each process; of a larger one only the
#: time that the rows at hand ask about.
WHOLE_BYTES = 512 * 2**20

_AT, _CREATED = "__at__", "__created__"
_MOMENT, _ROW = "__moment__", "__row__"


@dataclass(slots=True)
class _Held:
    """A view's rows in memory: complete for moments from ``low_us`` to ``high_us`` (None: all)."""

    table: Any
    low_us: int | None = None
    high_us: int | None = None

    def covers(self, low_us: int, high_us: int) -> bool:
        return self.low_us is None or (
            self.high_us is not None and self.low_us <= low_us and high_us <= self.high_us
        )


class Sources:
    """Views' sources, read from Parquet files when they are first needed.

    A source of up to ``whole_bytes`` is read once. Of a larger one those rows are read that can
    matter for the moments at hand (Parquet's row groups outside that time are skipped), and kept
    until other moments are asked for. Moments are int64, µs since 1970 (UTC).
    """

    def __init__(self, whole_bytes: int = WHOLE_BYTES) -> None:
        self._whole_bytes = whole_bytes
        self._held: dict[str, _Held] = {}

    def table(self, view: ViewSpec, low_us: int, high_us: int) -> Any:
        """A Polars frame of the view's rows that matter for moments from ``low_us`` to ``high_us``:
        its keys, features and ``__at__``, sorted by ``__at__``, one row for each key and moment.
        Raises ConfigError when the source cannot be read as Parquet, or lacks a column."""
        held = self._held.get(view.title)
        if held is None or not held.covers(low_us, high_us):
            held = self._held[view.title] = self._read(view, low_us, high_us)
        return held.table

    def _read(self, view: ViewSpec, low_us: int, high_us: int) -> _Held:
        files = _files(view)
        if files is None or _bytes_in_memory(files) <= self._whole_bytes:
            return _Held(_collect(view, scan_rows(view)))
        return _Held(_collect(view, _around(view, low_us, high_us)), low_us, high_us)


def as_of_join(
    view: ViewSpec, keys: Columns, moments: NDArray[np.int64], sources: Sources
) -> ViewRows:
    """For each of n rows the values of one view that held at its moment.

    ``keys`` has the view's key columns (n,), in which null (None, NaN) matches nothing; ``moments``
    is int64 (n,), µs since 1970 (UTC), NEVER for a row that has none and so finds nothing. Rows
    keep their order. Raises ConfigError as `Sources.table` does.
    """
    import polars as pl

    n = len(moments)
    asked = moments != NEVER
    low_us, high_us = (
        (int(moments[asked].min()), int(moments[asked].max())) if asked.any() else (0, 0)
    )
    table = sources.table(view, low_us, high_us)
    wanted = pl.DataFrame(
        {
            **{key: _key(keys[key], table[key].dtype) for key in view.entity_keys},
            _MOMENT: moments,
            _ROW: np.arange(n),
        }
    ).sort(_MOMENT)
    joined = wanted.join_asof(
        table, left_on=_MOMENT, right_on=_AT, by=list(view.entity_keys), strategy="backward",
        coalesce=False, check_sortedness=False,
    ).sort(_ROW)  # fmt: skip
    at = joined[_AT]
    found = at.is_not_null().to_numpy() & asked
    for key in view.entity_keys:
        found &= joined[key].is_not_null().to_numpy()
    event_us = at.fill_null(NEVER).to_numpy()
    if view.ttl_s is not None:
        found &= moments - np.where(found, event_us, moments) <= round(view.ttl_s * 1_000_000)
    values: Columns = {}
    nulls: dict[str, Nulls] = {}
    for name, kind in view.features.items():
        values[name], nulls[name] = _column(joined[name], kind)
    return ViewRows(view, values, found, np.where(found, event_us, NEVER), nulls)


def history_columns(
    views: Sequence[ViewSpec],
    maker: RowMaker,
    columns: Columns,
    moments: NDArray[np.int64],
    sources: Sources,
) -> Columns:
    """A service's columns as of the rows' moments: every view joined, views on demand computed."""
    joined = [as_of_join(view, columns, moments, sources) for view in views]
    return maker.columns(joined, columns, len(moments))


def _polars() -> Any:
    try:
        import polars
    except ImportError:
        raise MissingExtraError("polars", "features") from None
    return polars


def _files(view: ViewSpec) -> list[Path] | None:
    """The local Parquet files of a view's source; None for one that is elsewhere."""
    path = view.source_path
    if path is not None and "://" in path:
        return None
    if path is None or not Path(path).exists():
        raise ConfigError(
            f"view {view.name!r} has no file to read its history from (its source: {path}): a "
            "point-in-time join needs a FileSource of Parquet that this process can read"
        )
    if Path(path).is_dir():
        return sorted(Path(path).glob("**/*.parquet"))
    return [Path(path)]


def _bytes_in_memory(files: Sequence[Path]) -> int:
    """Uncompressed size by the files' footers."""
    import pyarrow.parquet as pq

    total = 0
    for file in files:
        footer = pq.read_metadata(file)
        total += sum(footer.row_group(i).total_byte_size for i in range(footer.num_row_groups))
    return total


def scan_rows(view: ViewSpec, low_us: int | None = None, high_us: int | None = None) -> Any:
    """The view's rows, lazily: keys, features, ``__at__`` and, if there is one, ``__created__``;
    only those from ``low_us`` to ``high_us`` where these are given."""
    pl = _polars()
    path = str(view.source_path)
    if "://" not in path and Path(path).is_dir():
        path = f"{path}/**/*.parquet"
    rows = pl.scan_parquet(path)
    kinds = rows.collect_schema()
    stored = dict(zip(view.stored_keys or view.entity_keys, view.entity_keys, strict=True))
    names = {v: k for k, v in view.field_mapping.items()}
    wanted = {names.get(key, key): column for key, column in stored.items()}
    wanted |= {names.get(name, name): name for name in view.features}
    for column in (*wanted, view.timestamp_field):
        if column not in kinds:
            raise ConfigError(
                f"the source of view {view.name!r} ({path}) has no column {column!r}."
                f"{did_you_mean(column, kinds.names())}"
            )
    # Conditions on the source's own column let Parquet's statistics skip whole row groups.
    at, kind = pl.col(view.timestamp_field), kinds[view.timestamp_field]
    # Whole units of the column: one in milliseconds has none between, one in nanoseconds may have
    # rows later within the same microsecond.
    unit_us = 1000 if kind.time_unit == "ms" else 1
    if low_us is not None:
        rows = rows.filter(at >= _moment(-(-low_us // unit_us) * unit_us, kind))
    if high_us is not None:
        rows = rows.filter(at < _moment((high_us // unit_us + 1) * unit_us, kind))
    columns = [pl.col(source).alias(name) for source, name in wanted.items()]
    columns.append(at.dt.epoch("us").alias(_AT))
    if view.created_field is not None:
        columns.append(pl.col(view.created_field).alias(_CREATED))
    return rows.filter(at.is_not_null()).select(columns)


def _moment(us: int, kind: Any) -> Any:
    """A moment as values of a source's column are: of its unit, in its zone; naive ones are UTC."""
    pl = _polars()
    moment = pl.lit(us).cast(pl.Datetime("us")).cast(pl.Datetime(kind.time_unit))
    if kind.time_zone is None:
        return moment
    return moment.dt.replace_time_zone("UTC").dt.convert_time_zone(kind.time_zone)


def _around(view: ViewSpec, low_us: int, high_us: int) -> Any:
    """The rows that can matter between two moments: those of that time, and of the time before it
    those that may still hold then."""
    pl = _polars()
    if view.ttl_s is not None:
        return scan_rows(view, low_us - round(view.ttl_s * 1_000_000), high_us)
    before = latest(view, scan_rows(view, None, low_us - 1))
    return pl.concat([before, scan_rows(view, low_us, high_us)])


def latest(view: ViewSpec, rows: Any) -> Any:
    """Of the view's rows the last one of each key, lazily."""
    order = [_AT] if view.created_field is None else [_AT, _CREATED]
    keys = list(view.entity_keys)
    return rows.sort(*order, maintain_order=True).unique(keys, keep="last", maintain_order=True)


def _collect(view: ViewSpec, rows: Any) -> Any:
    order = [_AT] if view.created_field is None else [_AT, _CREATED]
    keys = list(view.entity_keys)
    return (
        rows.sort(*order, maintain_order=True)
        .select(*keys, *view.features, _AT)
        .unique([*keys, _AT], keep="last", maintain_order=True)
        .collect()
    )


def _key(values: NDArray[Any], dtype: Any) -> Any:
    """A column of keys as the source has them; null for None and NaN."""
    pl = _polars()
    if values.dtype == object:
        plain = [None if value is None or value != value else value for value in values.tolist()]
        return pl.Series(plain, dtype=dtype, strict=False)
    series = pl.Series(values)
    return (series.fill_nan(None) if values.dtype.kind == "f" else series).cast(dtype)


def _column(series: Any, kind: str) -> tuple[NDArray[Any], Nulls]:
    """A joined column as the feature's type: null is NaN, NaT or None, or 0 with a mark."""
    pl = _polars()
    if kind in ("float32", "float64"):
        dtype = pl.Float32 if kind == "float32" else pl.Float64
        return series.cast(dtype).fill_null(np.nan).to_numpy(), None
    if kind in ("int32", "int64", "bool") and series.dtype.is_integer() | (
        series.dtype == pl.Boolean
    ):
        marks = series.is_null().to_numpy() if series.null_count() else None
        filler = False if series.dtype == pl.Boolean else 0
        return series.fill_null(filler).to_numpy().astype(kind), marks
    return from_objects(series.to_list(), kind)
