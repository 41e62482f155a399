"""Feast's stored values as arrays, a whole column at a time, without an object for each value.

A value is a serialized ``feast.types.Value`` (a protobuf message with one field of a oneof), so
that its first byte tells the type and the rest is the number, little-endian, or a varint
(https://protobuf.dev/programming-guides/encoding). An empty message, one with ``null_val`` and a
value that is not there all mean null. What is no plain scalar goes through Feast's own message.
"""

import struct
from collections.abc import Callable, Sequence
from itertools import chain, groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinpath.graph.columns import Columns

#: One value as stored: bytes of a Value, or None.
Raw = bytes | None
#: Null rows of a column whose type has no null of its own; None when there are none.
Nulls = NDArray[np.bool_] | None

#: The moment, in µs since 1970, of a row that is not there.
NEVER = np.iinfo(np.int64).min

# Field number << 3 | wire type (0 varint, 1 eight bytes, 2 counted bytes, 5 four bytes).
_BYTES, _STRING, _INT32, _INT64, _DOUBLE, _FLOAT, _BOOL, _UNIX = (
    *(0x0A, 0x12, 0x18, 0x20),
    *(0x29, 0x35, 0x38, 0x40),
)
_NULL = b"\x98\x01\x00"
_FLOAT_NAN = bytes([_FLOAT]) + np.float32(np.nan).tobytes()
_DOUBLE_NAN = bytes([_DOUBLE]) + np.float64(np.nan).tobytes()
_FLOATS = {
    "float32": (_FLOAT_NAN, np.dtype([("tag", "u1"), ("value", "<f4")]), _FLOAT),
    "float64": (_DOUBLE_NAN, np.dtype([("tag", "u1"), ("value", "<f8")]), _DOUBLE),
}
_VARINTS = {"int32": _INT32, "int64": _INT64, "bool": _BOOL, "datetime64[us]": _UNIX}

#: A moment of our time: tag, five bytes of seconds (all but the last say that more follow), tag,
#: one to five bytes of nanoseconds; without nanoseconds both are left out. Zeros fill it up.
_MOMENT_BYTES = 16
_MOMENT_MASK = np.uint64(int.from_bytes(b"\xff\x80\x80\x80\x80\x80\xef\0", "little"))
_MOMENT_BITS = np.uint64(int.from_bytes(b"\x08\x80\x80\x80\x80\0\0\0", "little"))
#: What each byte counts for: microseconds of the seconds, and nanoseconds.
_MOMENT_PARTS = np.zeros((_MOMENT_BYTES, 2), dtype=np.int64)
_MOMENT_PARTS[7:12, 1] = 1 << np.arange(0, 35, 7)
_MOMENT_PARTS[1:6, 0] = _MOMENT_PARTS[7:12, 1] * 1_000_000


def column(raw: Sequence[Raw], kind: str) -> tuple[NDArray[Any], Nulls]:
    """Values of one feature as an array of the column type ``kind``.

    Null is NaN, NaT or None; integers and booleans, which have none, are 0 there and marked in the
    second result.
    """
    if kind in _FLOATS:
        found = _floats(raw, kind, 1)
        if found is not None:
            return found[0], None
    elif kind in _VARINTS:
        numbers = _varints(raw, _VARINTS[kind])
        if numbers is not None:
            return _as_kind(*numbers, kind)
    elif kind == "str":
        return _texts(raw), None
    return _slowly(raw, kind)


def columns_of(
    rows: Sequence[Sequence[Raw]], start: int, kinds: Sequence[str]
) -> list[tuple[NDArray[Any], Nulls]]:
    """The features that stand in each row from ``start`` on, each as by :func:`column`. Floats
    side by side are decoded together."""
    found: list[tuple[NDArray[Any], Nulls]] = []
    for kind, run in groupby(kinds):
        end = start + len(list(run))
        block = None
        if kind in _FLOATS and end - start > 1:
            cells = list(chain.from_iterable([row[start:end] for row in rows]))
            block = _floats(cells, kind, end - start)
        if block is not None:
            found += [(values, None) for values in block]
        else:
            found += [column([row[at] for row in rows], kind) for at in range(start, end)]
        start = end
    return found


def _floats(raw: Sequence[Raw], kind: str, width: int) -> NDArray[Any] | None:
    """Values that stand row by row, ``width`` in each, as an array (width, rows). None when
    another type is among them."""
    nan, layout, tag = _FLOATS[kind]
    size = layout.itemsize * len(raw)
    if all(raw):
        joined = b"".join(raw)  # type: ignore[arg-type]  # no None is among them
    else:
        joined = b"".join([value or nan for value in raw])
    if len(joined) != size:
        joined = b"".join([nan if not value or value == _NULL else value for value in raw])
        if len(joined) != size:
            return None
    cells = np.frombuffer(joined, dtype=layout)
    if np.count_nonzero(cells["tag"] == tag) != len(raw):
        return None
    return cells["value"].reshape(-1, width).T.copy(order="C")


def _varints(raw: Sequence[Raw], tag: int) -> tuple[NDArray[np.int64], Nulls] | None:
    """Numbers behind one tag byte each. None when another type is among them."""
    blank = bytes([tag, 0])
    nulls = None
    if not all(raw) or _NULL in raw:
        nulls = np.array([not value or value == _NULL for value in raw], dtype=bool)
        raw = [blank if null else value for value, null in zip(raw, nulls, strict=True)]
    values: Sequence[bytes] = raw  # type: ignore[assignment]  # no None is left
    lengths = np.fromiter(map(len, values), dtype=np.int64, count=len(values))
    cells = np.frombuffer(b"".join(values), dtype=np.uint8)
    starts = np.cumsum(lengths) - lengths
    if not (cells[starts] == tag).all():
        return None
    return varints(cells, starts + 1, lengths - 1), nulls


def varints(
    cells: NDArray[np.uint8], starts: NDArray[np.int64], lengths: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The varints of the given lengths (bytes) at these starts, as signed 64-bit numbers."""
    total = np.zeros(len(starts), dtype=np.uint64)
    for place in range(int(lengths.max(initial=0))):
        longer = lengths > place
        part = cells[np.where(longer, starts + place, 0)].astype(np.uint64) & np.uint64(0x7F)
        total |= np.where(longer, part, np.uint64(0)) << np.uint64(7 * place)
    return total.view(np.int64)


def _as_kind(values: NDArray[np.int64], nulls: Nulls, kind: str) -> tuple[NDArray[Any], Nulls]:
    if kind != "datetime64[us]":
        return values.astype(kind), nulls
    moments = values.astype("datetime64[s]").astype("datetime64[us]")
    if nulls is not None:
        moments[nulls] = np.datetime64("NaT")
    return moments, None


def _texts(raw: Sequence[Raw]) -> NDArray[np.object_]:
    texts = np.empty(len(raw), dtype=object)
    for row, value in enumerate(raw):
        # One length byte says up to 127; longer texts and other types take the general way.
        if value and value[0] == _STRING and value[1] < 0x80:
            texts[row] = value[2:].decode()
        else:
            texts[row] = scalar(value)
    return texts


def _slowly(raw: Sequence[Raw], kind: str) -> tuple[NDArray[Any], Nulls]:
    """Any mixture of stored types, value by value."""
    return from_objects([scalar(value) for value in raw], kind)


def from_objects(values: Sequence[Any], kind: str) -> tuple[NDArray[Any], Nulls]:
    """Python values, None for null, as in :func:`column`."""
    if kind in _FLOATS:
        return np.array([np.nan if v is None else v for v in values], dtype=kind), None
    if kind in ("int32", "int64", "bool"):
        nulls = np.array([value is None for value in values], dtype=bool)
        numbers = np.array([0 if value is None else value for value in values], dtype=kind)
        return numbers, nulls if nulls.any() else None
    if kind == "datetime64[us]":
        moments = [np.datetime64("NaT") if v is None else np.datetime64(_naive(v)) for v in values]
        return np.array(moments, dtype="datetime64[us]"), None
    array = np.empty(len(values), dtype=object)
    array[:] = values if array.ndim and not any(map(_is_sequence, values)) else None
    for row, value in enumerate(values):
        array[row] = value
    return array, None


def _is_sequence(value: Any) -> bool:
    return isinstance(value, (list, tuple, np.ndarray))


def _naive(value: Any) -> Any:
    """A moment without its zone, in UTC."""
    from datetime import UTC

    zone = getattr(value, "tzinfo", None)
    return value.astimezone(UTC).replace(tzinfo=None) if zone is not None else value


def scalar(value: Raw) -> Any:
    """One stored value as a Python object, None for null."""
    if not value or value == _NULL:
        return None
    plain = _PLAIN.get(value[0])
    if plain is not None:
        return plain(value)
    from feast.protos.feast.types.Value_pb2 import Value
    from feast.type_map import feast_value_type_to_python_type

    return feast_value_type_to_python_type(Value.FromString(value))


def _varint(value: bytes) -> int:
    total = 0
    for place, part in enumerate(value[1:]):
        total |= (part & 0x7F) << 7 * place
    return total - (1 << 64) if total >> 63 else total


_PLAIN: dict[int, Callable[[bytes], Any]] = {
    _INT32: _varint,
    _INT64: _varint,
    _BOOL: lambda value: value[1:] == b"\x01",
    _DOUBLE: lambda value: struct.unpack("<d", value[1:])[0],
    _FLOAT: lambda value: struct.unpack("<f", value[1:])[0],
}


def timestamps(raw: Sequence[Raw]) -> NDArray[np.int64]:
    """Serialized ``google.protobuf.Timestamp`` messages as µs since 1970, NEVER for null."""
    joined = b"".join([(value or b"").ljust(_MOMENT_BYTES, b"\0") for value in raw])
    if len(joined) != _MOMENT_BYTES * len(raw):
        return np.array([_timestamp(value) for value in raw], dtype=np.int64)
    heads = np.frombuffer(joined, dtype="<u8")[::2]
    known = (heads & _MOMENT_MASK) == _MOMENT_BITS
    cells = np.frombuffer(joined, dtype=np.uint8).reshape(-1, _MOMENT_BYTES)
    whole_us, nanos = ((cells & 0x7F) @ _MOMENT_PARTS).T
    moments = whole_us + nanos // 1000
    if np.count_nonzero(known) != len(raw):
        for row in np.flatnonzero(~known).tolist():
            moments[row] = _timestamp(raw[row])
    return np.asarray(moments, dtype=np.int64)


def _timestamp(value: Raw) -> int:
    if value is None:
        return int(NEVER)
    from google.protobuf.timestamp_pb2 import Timestamp

    moment = Timestamp.FromString(value)
    return int(moment.seconds * 1_000_000 + moment.nanos // 1000)


def take(columns: Columns, nulls: dict[str, Nulls], rows: NDArray[np.int64]) -> Columns:
    """The given rows of every column; their null marks are replaced in place."""
    for name, marks in nulls.items():
        if marks is not None:
            nulls[name] = marks[rows]
    return {name: values[rows] for name, values in columns.items()}
