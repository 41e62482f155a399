"""As-of look-ups over one feature view: the newest row known at a moment, for many keys at once."""

from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from graphs.flights_model.features import View


class Timeline:
    """Rows of one view, ready for vectorised as-of look-ups.

    Entities become codes, and a row's place is one int64 `(code << 34) | second`, so that a batch
    of look-ups is a single binary search. Seconds since 1970 stay below 2**34 until year 2514.
    """

    _SHIFT = 34

    def __init__(
        self,
        entity: Iterable[str],
        known_at: NDArray[np.datetime64],
        values: NDArray[np.float32],
        ttl: timedelta,
    ) -> None:
        """Take rows in any order.

        Args:
            entity: n names.
            known_at: (n,) datetime64, UTC.
            values: (n, k) float32; NaN where a value is missing.
            ttl: how long a row holds.
        """
        self._codes: dict[str, int] = {}
        code = [self._codes.setdefault(name, len(self._codes)) for name in entity]
        # Rounded up, so that a row is never visible before its moment.
        seconds = -(-known_at.astype("datetime64[us]").astype(np.int64) // 1_000_000)
        place = (np.array(code, dtype=np.int64) << self._SHIFT) | seconds
        order = np.argsort(place, kind="stable")
        nothing = np.full((1, values.shape[1]), np.nan, dtype=np.float32)
        self._places = place[order]
        #: The last row is all NaN: what an absent entity gets.
        self._values = np.concatenate([values[order].astype(np.float32), nothing])
        self._ttl = int(ttl.total_seconds())

    @classmethod
    def read(cls, directory: Path, view: View) -> "Timeline":
        """Load one view from `directory`/features."""
        table = pl.read_parquet(directory / "features" / f"{view.name}.parquet")
        return cls(
            table["entity"].to_list(),
            table["known_at"].to_numpy(),
            table.select(pl.col(view.values).cast(pl.Float32).fill_null(np.nan)).to_numpy(),
            view.ttl,
        )

    def as_of(self, entity: NDArray[np.object_], seconds: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the values that held at a moment.

        Args:
            entity: (m,) names; unknown ones and None are absent.
            seconds: (m,) int64 seconds since 1970, UTC.

        Returns:
            (k, m) float32; NaN where the entity is unknown, has no row yet, or it ran out.
        """
        get = self._codes.get
        code = np.array([get(name, -1) for name in entity.tolist()], dtype=np.int64)
        wanted = (code << self._SHIFT) | seconds
        row = np.searchsorted(self._places, wanted, side="right") - 1
        # A row of another entity is at least one code away, hence far older than any ttl.
        held = (code >= 0) & (row >= 0) & (wanted - self._places[row] <= self._ttl)
        found: NDArray[np.float32] = self._values[np.where(held, row, -1)].T
        return found
