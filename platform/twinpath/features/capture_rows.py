"""Captured rows as columns."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinpath.graph.columns import Columns

#: As the capture names the column of moments (int64, µs since 1970, UTC).
MOMENT = "__moment__"


def columns_of(table: Any) -> tuple[Columns, NDArray[np.int64]]:
    """An Arrow table of captured rows as columns, and the rows' moments. Numbers with nulls and
    everything that NumPy has no type for become object columns, None for null."""
    import pyarrow as pa

    columns: Columns = {}
    for name in table.column_names:
        column = table.column(name).combine_chunks()
        if isinstance(column, pa.ChunkedArray):
            column = pa.concat_arrays(column.chunks)
        kind = column.type
        plain = pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)
        if pa.types.is_timestamp(kind):
            columns[name] = column.to_numpy(zero_copy_only=False).astype("datetime64[us]")
        elif plain and not column.null_count:
            columns[name] = column.to_numpy(zero_copy_only=False)
        else:
            values = np.empty(len(column), dtype=object)
            values[:] = column.to_pylist()
            columns[name] = values
    return columns, columns.pop(MOMENT).astype(np.int64)
