"""Entity keys of a batch: each distinct one once, in Feast's own serialization (version 3).

A key is the number of join keys, their names in order, and their values, each with its type and
length as little-endian 32-bit numbers (Feast: ``infra/key_encoding_utils.py``).
"""

import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinpath.errors import ConfigError
from twinpath.features.spec import ViewSpec
from twinpath.graph.columns import Columns

_pair = struct.Struct("<II").pack
_INT32, _INT64 = struct.Struct("<IIi").pack, struct.Struct("<IIq").pack


def _texts(values: Iterable[str]) -> list[bytes]:
    return [_pair(2, len(encoded)) + encoded for encoded in map(str.encode, values)]


def _unix(value: Any) -> int:
    return int(np.datetime64(value, "us").astype("datetime64[s]").astype(np.int64))


#: By type of column: its values, each with its type and length.
_ENCODERS: dict[str, Callable[[Iterable[Any]], list[bytes]]] = {
    "str": _texts,
    "int32": lambda values: [_INT32(3, 4, value) for value in values],
    "int64": lambda values: [_INT64(4, 8, value) for value in values],
    "any": lambda values: [_pair(1, len(value)) + value for value in values],
    "datetime64[us]": lambda values: [_INT64(8, 8, _unix(value)) for value in values],
}


@dataclass(frozen=True, slots=True)
class Distinct:
    """The distinct keys of a batch, and for each row which of them it has (-1: a null key);
    ``place`` is None where each row has a key of its own, in their order."""

    keys: tuple[bytes, ...]
    place: NDArray[np.int64] | None
    rows: int


class KeyEncoder:
    """Serializes the keys of views that share their entities. ``suffix`` ends every key (Redis
    appends the project's name). Raises ConfigError for a key type that Feast cannot store, and for
    a view without keys."""

    def __init__(self, view: ViewSpec, suffix: bytes = b"") -> None:
        if not view.entity_keys:
            raise ConfigError(
                f"view {view.name!r} has no entity: give it one, such as a constant key"
            )
        pairs = sorted(zip(view.stored_keys or view.entity_keys, view.entity_keys, strict=True))
        self.columns = tuple(column for _, column in pairs)
        self._suffix = suffix
        self._prefix = struct.pack("<I", len(pairs)) + b"".join(_texts(name for name, _ in pairs))
        kinds = [view.key_types.get(column, "str") for column in self.columns]
        for column, kind in zip(self.columns, kinds, strict=True):
            if kind not in _ENCODERS:
                raise ConfigError(
                    f"view {view.name!r} has the entity key {column!r} of type {kind}: expected a "
                    "text, an integer, bytes or a timestamp"
                )
        self._encoders = [_ENCODERS[kind] for kind in kinds]

    def distinct(self, columns: Columns) -> Distinct:
        """The keys of a batch; a row with a null in one of its keys has none."""
        values = [columns[name].tolist() for name in self.columns]
        if len(values) == 1:
            return self._single(values[0])
        places: dict[Any, int] = {}
        place = [
            -1 if any(map(_is_null, row)) else places.setdefault(row, len(places))
            for row in zip(*values, strict=True)
        ]
        parts = [
            encode(column)
            for encode, column in zip(self._encoders, zip(*places, strict=True), strict=False)
        ]
        return _distinct(self._keys(map(b"".join, zip(*parts, strict=True))), place)

    def _single(self, values: Sequence[Any]) -> Distinct:
        places: dict[Any, int] = {}
        place = [-1 if v is None or v != v else places.setdefault(v, len(places)) for v in values]
        return _distinct(self._keys(self._encoders[0](places)), place)

    def _keys(self, encoded: Iterable[bytes]) -> tuple[bytes, ...]:
        prefix, suffix = self._prefix, self._suffix
        return tuple([prefix + part + suffix for part in encoded])


def _distinct(keys: tuple[bytes, ...], place: Sequence[int]) -> Distinct:
    rows = len(place)
    return Distinct(keys, None if len(keys) == rows else np.array(place, dtype=np.int64), rows)


def _is_null(value: Any) -> bool:
    return value is None or value != value
