"""What held at given moments: the point-in-time join of one view's source with a batch of keys."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinpath.errors import ConfigError
from twinpath.features.decode import from_objects
from twinpath.features.spec import ViewSpec
from twinpath.graph.columns import Columns


class Sources:
    """Tables of views' sources, each read once."""

    def __init__(self) -> None:
        self._tables: dict[str, Any] = {}

    def table(self, view: ViewSpec) -> Any:
        """A view's rows, sorted by moment, of rows with the same key and moment the last written.
        Raises ConfigError when the source is no Parquet file."""
        if view.title in self._tables:
            return self._tables[view.title]
        import polars as pl

        path = view.source_path
        if path is None or not Path(path).exists():
            raise ConfigError(
                f"view {view.name!r} has no file to read its history from (its source: {path})"
            )
        stored = dict(zip(view.stored_keys or view.entity_keys, view.entity_keys, strict=True))
        names = {v: k for k, v in view.field_mapping.items()}
        at = pl.col(view.timestamp_field)
        order = [at] if view.created_field is None else [at, pl.col(view.created_field)]
        files = f"{path}/**/*.parquet" if Path(path).is_dir() else path
        table = (
            pl.scan_parquet(files)
            .sort(*order, maintain_order=True)
            .select(
                *(pl.col(names.get(key, key)).alias(column) for key, column in stored.items()),
                at.dt.epoch("us").alias("__at__"),
                *(pl.col(names.get(name, name)).alias(name) for name in view.features),
            )
            .unique([*view.entity_keys, "__at__"], keep="last", maintain_order=True)
            .collect()
        )
        self._tables[view.title] = table
        return table


def as_of_join(
    view: ViewSpec, keys: Columns, moments: NDArray[np.int64], sources: Sources
) -> Columns:
    """For each row the newest values with an event timestamp not after its moment (µs since 1970,
    UTC) and not older than the view's time to live, and ``__found__``."""
    import polars as pl

    table = sources.table(view)
    n = len(moments)
    wanted = pl.DataFrame(
        {
            **{
                key: pl.Series(keys[key].tolist(), dtype=table[key].dtype)
                for key in view.entity_keys
            },
            "__moment__": moments,
            "__row__": np.arange(n),
        }
    ).sort("__moment__")
    joined = wanted.join_asof(
        table,
        left_on="__moment__",
        right_on="__at__",
        by=list(view.entity_keys),
        strategy="backward",
        coalesce=False,
        check_sortedness=False,
    ).sort("__row__")
    at = joined["__at__"]
    found = at.is_not_null().to_numpy()
    if view.ttl_s is not None:
        age = moments - at.fill_null(0).to_numpy()
        found &= age <= round(view.ttl_s * 1_000_000)
    columns: Columns = {"__found__": found}
    for name, kind in view.features.items():
        series = joined[name]
        if kind in ("float32", "float64"):
            columns[name] = series.cast(pl.Float64).fill_null(np.nan).to_numpy().astype(kind)
        else:
            columns[name] = from_objects(series.to_list(), kind)[0]
            if kind in ("int32", "int64", "bool") and series.null_count():
                columns[name] = np.array(series.to_list(), dtype=object)
    return columns
