"""Pushed rows against their view: every key and feature is there, and of its type."""

import base64
import binascii
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from twinpath.errors import InputError, did_you_mean
from twinpath.features.writing import StoreRow, ViewWriter

#: An event timestamp may be this much ahead of the clock here. One far in the future would keep
#: every later row out.
AHEAD_S = 300.0

_INTEGERS = {"Int32": 32, "Int64": 64}


class RowCheck:
    """Checks rows (a mapping of column → value each) for one view.

    A row has the view's keys (never null), all of its features (null where there is no value,
    since the row replaces the one before) and, unless it is to count from now, its event timestamp.
    Timestamps are datetimes, ISO 8601 texts (UTC unless they say otherwise) or seconds since 1970;
    bytes may be base64.
    """

    def __init__(self, writer: ViewWriter) -> None:
        self._writer = writer
        self._at = writer.timestamp_field
        self._columns = dict(writer.keys) | dict(writer.features)
        self._reads = {name: _reader(str(dtype)) for name, dtype in self._columns.items()}

    def store_rows(self, rows: Sequence[Mapping[str, Any]], now_s: float) -> list[StoreRow]:
        """Checked rows as the store takes them; ``now_s`` is seconds since 1970. Raises InputError
        that names row, column, value and what was expected."""
        view = self._writer.view.name
        if not rows:
            raise InputError(f"no rows for view {view!r}: send at least one")
        columns: dict[str, list[Any]] = {name: [] for name in self._columns}
        moments = []
        for number, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise InputError(f"row {number}: expected an object of column → value, got {row!r}")
            for name in row:
                if name not in self._columns and name != self._at:
                    known = did_you_mean(str(name), [*self._columns, self._at])
                    raise InputError(f"row {number}: view {view!r} has no column {name!r}.{known}")
            for name, values in columns.items():
                values.append(self._value(number, name, row))
            moments.append(self._moment(number, row, now_s))
        try:
            return self._writer.rows(columns, moments)
        except (ValueError, TypeError, OverflowError) as error:
            raise InputError(f"rows of view {view!r} cannot be stored: {error}") from error

    def _value(self, number: int, name: str, row: Mapping[str, Any]) -> Any:
        if name not in row:
            raise InputError(
                f"row {number} of view {self._writer.view.name!r} lacks {name!r}: a row replaces "
                "the one before, so give every feature, null for no value"
            )
        value = _plain(row[name])
        if value is None:
            if name in self._writer.keys:
                raise InputError(f"row {number}: the key {name!r} is null")
            return None
        try:
            return self._reads[name](value)
        except (ValueError, TypeError, OverflowError):
            kind = self._columns[name]
            raise InputError(f"row {number}, column {name!r}: {value!r} is no {kind}") from None

    def _moment(self, number: int, row: Mapping[str, Any], now_s: float) -> datetime:
        value = _plain(row.get(self._at, now_s))
        try:
            moment = _moment(value)
        except (ValueError, TypeError, OverflowError, OSError):
            raise InputError(
                f"row {number}, column {self._at!r}: {value!r} is no moment: expected ISO 8601 "
                "text, such as 2024-05-01T12:00:00Z, or seconds since 1970"
            ) from None
        if moment.timestamp() > now_s + AHEAD_S:
            raise InputError(
                f"row {number}, column {self._at!r}: {moment.isoformat()} is over {AHEAD_S:g} s in "
                "the future"
            )
        return moment


def _reader(kind: str) -> Callable[[Any], Any]:
    """Reads one value that is not null as a Feast type. Raises ValueError or TypeError."""
    if kind in _INTEGERS:
        return lambda value: _integer(value, _INTEGERS[kind])
    known: dict[str, Callable[[Any], Any]] = {
        "Float32": _float,
        "Float64": _float,
        "Bool": lambda value: _only(value, bool),
        "String": lambda value: _only(value, str),
        "UnixTimestamp": _moment,
        "Bytes": _bytes,
    }
    # Lists and the rest: Feast's own conversion decides.
    return known.get(kind, lambda value: value)


def _plain(value: Any) -> Any:
    """Without NumPy's scalar types, and with None for NaN and NaT."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and math.isnan(value):
        return None
    return None if value != value else value


def _only(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError
    return value


def _integer(value: Any, bits: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError
    if not -(2 ** (bits - 1)) <= value < 2 ** (bits - 1):
        raise ValueError
    return value


def _float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError
    return float(value)


def _bytes(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    try:
        return base64.b64decode(_only(value, str), validate=True)
    except binascii.Error as error:
        raise ValueError from error


def _moment(value: Any) -> datetime:
    if isinstance(value, bool):
        raise TypeError
    if isinstance(value, (int, float)):
        return datetime.fromtimestamp(value, UTC)
    moment = value if isinstance(value, datetime) else datetime.fromisoformat(_only(value, str))
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
