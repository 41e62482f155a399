"""Which version scores a row: sticky, monotone, and the same in every process.

A row's key (or the row as a whole) is hashed to a number in [0, 1); the challenger has the rows
below its share. So a key keeps its version for as long as the share stands, one that the
challenger has at 5 % it has at 25 %, and a rollout with another id draws other keys first.
Numbers are hashed in one numpy pass (multilinear, then the finaliser of SplitMix64: Steele, Lea,
Flood, OOPSLA 2014), text by XXH3. Nothing depends on the process, the platform or the batch.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

import numpy as np
import xxhash
from numpy.typing import NDArray

from twinpath.errors import InputError, did_you_mean
from twinpath.graph.columns import Columns, row_count
from twinpath.rollout.state import RolloutState

Words = NDArray[np.uint64]

_digest = xxhash.xxh3_64_intdigest


@dataclass(frozen=True, slots=True)
class Parts:
    """Which rows the challenger answers, and which it scores beside the incumbent: masks (n,)."""

    challenger: NDArray[np.bool_]
    mirrored: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Split:
    """How rows are shared out. ``share`` + ``mirror`` over 1 mirrors all that is not answered."""

    salt: str
    share: float
    mirror: float = 0.0
    key: tuple[str, ...] | None = None

    @classmethod
    def of(cls, state: RolloutState) -> Self:
        """The split that a state asks for; everything to the incumbent if it is not live."""
        share, mirror = (state.share, state.mirror) if state.live else (0.0, 0.0)
        return cls(state.id, share, mirror, state.key)

    def parts(self, columns: Columns) -> Parts:
        """Both masks of a batch of n rows.

        Raises InputError when a key column is not in the batch.
        """
        n = row_count(columns)
        if self.share + self.mirror <= 0:
            return Parts(np.zeros(n, bool), np.zeros(n, bool))
        if self.share >= 1:
            return Parts(np.ones(n, bool), np.zeros(n, bool))
        at = fractions(columns, self.key, self.salt)
        challenger = at < self.share
        if not self.mirror:
            return Parts(challenger, np.zeros(n, bool))
        return Parts(challenger, (at >= self.share) & (at < self.share + self.mirror))


def fractions(columns: Columns, key: tuple[str, ...] | None, salt: str) -> NDArray[np.float64]:
    """A number in [0, 1) for each of the n rows, uniform over keys.

    ``key`` names columns; None takes all of them. Equal values give equal numbers whatever the
    width of their dtype; a missing key (None, NaN) is a key like any other.
    """
    names = tuple(sorted(columns)) if key is None else key
    for name in names:
        if name not in columns:
            raise InputError(
                f"key column {name!r} of the rollout is not in the batch."
                f"{did_you_mean(name, columns)}"
            )
    return _finalised(_mixed(columns, names, salt))


def _mixed(columns: Columns, names: tuple[str, ...], salt: str) -> Words:
    start, factors = _constants(names, salt)
    total = np.full(row_count(columns), start, np.uint64)
    wide: list[NDArray[Any]] = []
    wide_factors: list[np.uint64] = []
    for name, factor in zip(names, factors, strict=True):
        values = columns[name]
        if values.ndim == 1 and values.dtype.kind == "f":
            wide.append(values)
            wide_factors.append(factor)
        else:
            total += _folded(_words(values)) * factor
    if wide:
        words = _float_words(np.array(wide, np.float64))
        total += (_folded(words) * np.array(wide_factors)[:, None]).sum(axis=0, dtype=np.uint64)
    return total


@lru_cache(maxsize=256)
def _constants(names: tuple[str, ...], salt: str) -> tuple[np.uint64, tuple[np.uint64, ...]]:
    """A start for the salt and an odd factor for each column."""
    start = np.uint64(_digest(salt.encode()))
    return start, tuple(np.uint64(_digest(f"{salt}\0{name}".encode()) | 1) for name in names)


def _words(values: NDArray[Any]) -> Words:
    """One word for each row of a column."""
    kind = values.dtype.kind
    if values.ndim > 1:
        flat = np.ascontiguousarray(values).reshape(len(values), -1)
        if kind == "O":
            return _hashed("\0".join(map(str, row)).encode() for row in flat.tolist())
        if kind == "f":
            flat = _float_words(flat.astype(np.float64))
        return _hashed(row.tobytes() for row in flat)
    if kind in "biu":
        return values.astype(np.int64 if kind != "u" else np.uint64).view(np.uint64)
    if kind in "mM":
        return values.view(np.uint64)
    return _hashed(str(value).encode() for value in values.tolist())


def _hashed(texts: Iterable[bytes]) -> Words:
    return np.array([_digest(text) for text in texts], np.uint64)


def _float_words(values: NDArray[np.float64]) -> Words:
    values = values + 0.0  # -0.0 is 0.0
    values[values != values] = np.nan  # one NaN
    return values.view(np.uint64)


def _folded(words: Words) -> Words:
    """High bits into the low ones: a float of few digits has only zeros there."""
    return words ^ (words >> np.uint64(32))


def _finalised(words: Words) -> NDArray[np.float64]:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
