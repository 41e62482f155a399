"""Tensors of the Open Inference Protocol v2 as columns, and back.

https://github.com/kserve/open-inference-protocol (datatypes, JSON and binary representation).
A column of scalars is a tensor of shape ``[n]`` or ``[n, 1]``, a column of tensors ``[n, ...]``.
Text, times (ISO 8601) and free-form values (JSON) travel as BYTES.
"""

import datetime as dt
import math
import struct
from functools import lru_cache
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from twinpath.errors import InputError
from twinpath.graph.dtypes import ColumnType
from twinpath.graph.fields import utc_naive

#: OIP datatype → numpy dtype of its values in memory.
NUMPY: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("bool"),
    "INT8": np.dtype("int8"),
    "INT16": np.dtype("int16"),
    "INT32": np.dtype("int32"),
    "INT64": np.dtype("int64"),
    "UINT8": np.dtype("uint8"),
    "UINT16": np.dtype("uint16"),
    "UINT32": np.dtype("uint32"),
    "UINT64": np.dtype("uint64"),
    "FP16": np.dtype("float16"),
    "FP32": np.dtype("float32"),
    "FP64": np.dtype("float64"),
    "BF16": np.dtype("float32"),
    "BYTES": np.dtype(object),
}
_NAMES = {str(dtype): name for name, dtype in NUMPY.items() if name not in ("BF16", "BYTES")}
_NAMES["bfloat16"] = "BF16"
_KNOWN = [*NUMPY]  # a list, because what is looked up may be unhashable
_MAX_ELEMENTS = 1 << 28


def datatype_of(kind: ColumnType) -> str:
    """The OIP datatype of a column."""
    return _NAMES.get(kind.dtype, "BYTES")


def shape_of(kind: ColumnType) -> list[int]:
    """The OIP shape of a column; -1 stands for the number of rows."""
    return [-1, *(kind.shape or ())]


def checked_shape(name: str, datatype: Any, shape: Any) -> int:
    """The number of elements. Raises InputError for a datatype or shape that makes no sense."""
    if datatype not in _KNOWN:
        raise InputError(f"tensor {name!r}: datatype {datatype!r} is none of {', '.join(NUMPY)}")
    elements = extent = 1  # the extent counts empty dimensions too: numpy limits it
    whole = isinstance(shape, list | tuple) and 0 < len(shape) <= 32
    for size in shape if whole else ():
        whole = whole and type(size) is int and 0 <= size <= _MAX_ELEMENTS
        elements *= size if whole else 0
        extent *= (size or 1) if whole else 0
    if not whole or extent > _MAX_ELEMENTS:
        raise InputError(
            f"tensor {name!r}: shape {str(shape)[:80]}: expected a list of whole numbers, rows "
            f"first, of {_MAX_ELEMENTS} elements at most"
        )
    return elements


def from_json(
    name: str, datatype: str, shape: list[int], data: Any, *, may_hold_bools: bool = True
) -> NDArray[Any]:
    """``data``, flat or nested, as an array of this shape. Raises InputError.

    Python takes booleans for numbers, JSON does not: they are looked for, unless the caller knows
    that there are none.
    """
    elements = checked_shape(name, datatype, shape)
    if may_hold_bools and datatype not in ("BOOL", "BYTES") and _holds_bool(data):
        raise _wrong(name, datatype, data)
    packed = _packed(datatype, elements, data)
    if packed is not None:
        return packed.reshape(shape)
    if datatype == "BYTES":
        values = _texts(name, data)
    else:
        values = _numbers(name, datatype, data)
    if values.size != elements:
        raise InputError(
            f"tensor {name!r}: shape {shape} needs {elements} values, data has {values.size}"
        )
    return values.reshape(shape)


def from_raw(name: str, datatype: str, shape: list[int], raw: memoryview) -> NDArray[Any]:
    """The binary representation (little endian, row major) as a read-only array that shares its
    memory where the machine's own numbers are the same. Raises InputError."""
    elements = checked_shape(name, datatype, shape)
    if datatype == "BYTES":
        return _split_bytes(name, elements, raw).reshape(shape)
    item_bytes = 2 if datatype == "BF16" else NUMPY[datatype].itemsize
    if len(raw) != elements * item_bytes:
        raise InputError(
            f"tensor {name!r}: shape {list(shape)} of {datatype} needs {elements * item_bytes} "
            f"bytes, got {len(raw)}"
        )
    if datatype == "BF16":
        bits = np.frombuffer(raw, dtype="<u2").astype(np.uint32) << 16
        return bits.view(np.float32).reshape(shape)
    wire = NUMPY[datatype].newbyteorder("<")
    return np.frombuffer(raw, dtype=wire).astype(NUMPY[datatype], copy=False).reshape(shape)


def to_column(name: str, kind: ColumnType, values: NDArray[Any]) -> NDArray[Any]:
    """A tensor as the column that the graph reads. Raises InputError for another shape or kind."""
    wanted = kind.shape
    if wanted is None or kind.dtype in ("str", "any", "datetime64[us]"):
        wanted = ()
    if values.shape[1:] != wanted:
        if not (wanted == () and values.shape[1:] == (1,)):
            shape = [-1, *wanted]
            raise InputError(f"tensor {name!r}: expected shape {shape}, got {list(values.shape)}")
        values = values.reshape(len(values))
    if values.dtype == kind.numpy_dtype and values.dtype.kind != "O":
        return values
    if kind.dtype in ("str", "any", "datetime64[us]"):
        return _objects(name, kind, values)
    if kind.dtype == "float64" and values.dtype.kind in "iu":
        return values.astype(np.float64)
    conformed = kind.conform(values) if values.dtype.kind != "O" else None
    if conformed is None:
        given = _NAMES.get(str(values.dtype), "BYTES")
        raise InputError(
            f"tensor {name!r}: expected {datatype_of(kind)}, got {given}: send it as "
            f"{datatype_of(kind)}"
        )
    return conformed


def to_raw(values: NDArray[Any], datatype: str = "") -> bytes:
    """The binary representation of a column; that of BF16 has to be asked for."""
    if datatype == "BF16":
        return _to_bf16(values)
    if values.dtype.kind in "OM":
        texts = [_as_bytes(value) for value in as_texts(values)]
        return b"".join(len(text).to_bytes(4, "little") + text for text in texts)
    return values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()


def _to_bf16(values: NDArray[Any]) -> bytes:
    """float32 values as bfloat16, rounded to the nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    nan = np.isnan(values)
    return np.where(nan, (bits >> 16) | 0x40, rounded).astype("<u2").tobytes()


def as_texts(values: NDArray[Any]) -> list[Any]:
    """The values of a text, time or free-form column, row-major, as JSON would hold them: text
    as it is, missing ones None, everything else encoded."""
    if values.dtype.kind == "M":
        missing = np.isnat(values).ravel().tolist()
        texts = np.datetime_as_string(values).ravel().tolist()
        return [None if gone else text for gone, text in zip(missing, texts, strict=True)]
    return [_text(value) for value in values.ravel().tolist()]


def _text(value: Any) -> Any:
    if value is None or isinstance(value, str | bytes):
        return value
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY, default=str).decode()


def _as_bytes(value: Any) -> bytes:
    if value is None:
        return b""
    return value if isinstance(value, bytes) else str(value).encode()


#: Datatypes whose values `struct` packs, with its own check of range and kind.
_CODES = {
    "INT8": "b", "INT16": "h", "INT32": "i", "INT64": "q", "UINT8": "B", "UINT16": "H",
    "UINT32": "I", "UINT64": "Q", "FP32": "f", "FP64": "d", "BF16": "f",
}  # fmt: skip


@lru_cache(maxsize=1024)
def _struct(code: str, count: int) -> struct.Struct:
    return struct.Struct(f"={count}{code}")


def _holds_bool(data: Any) -> bool:
    pending = [data]
    while pending:
        item = pending.pop()
        if type(item) is bool:
            return True
        if type(item) is list:
            pending += item
    return False


def _packed(datatype: str, elements: int, data: Any) -> NDArray[Any] | None:
    """A flat list of nothing but fitting numbers, six times as fast as numpy reads it; None for
    any other, which takes the longer way to its array or its error."""
    code = _CODES.get(datatype)
    if code is None or type(data) is not list or len(data) != elements:
        return None
    try:
        packed = _struct(code, elements).pack(*data)
    except (struct.error, OverflowError):
        return None
    return np.frombuffer(packed, dtype=NUMPY[datatype])


def _numbers(name: str, datatype: str, data: Any) -> NDArray[Any]:
    wanted = NUMPY[datatype]
    try:
        values = np.asarray(data)
    except (ValueError, OverflowError):
        raise InputError(f"tensor {name!r}: data has lists of different lengths") from None
    found = values.dtype.kind
    if wanted.kind == "f":
        if found == "O":  # null stands for NaN
            values = _with_nan(name, datatype, values)
        elif found not in "iuf" and values.size:
            raise _wrong(name, datatype, data)
        with np.errstate(over="ignore"):
            return values.astype(wanted, copy=False)
    if wanted.kind == "b":
        if values.size and not (
            found == "b" or (found in "iu" and values.min() >= 0 and values.max() <= 1)
        ):
            raise _wrong(name, datatype, data)
        return values.astype(wanted, copy=False)
    if values.size and wanted == np.uint64 and found in "fO":
        return _big(name, data)  # numpy reads lists of numbers on both sides of 2**63 as floats
    if values.size:
        limits = np.iinfo(wanted)
        if found not in "iu" or values.min() < limits.min or values.max() > limits.max:
            raise _wrong(name, datatype, data)
    return values.astype(wanted, copy=False)


def _big(name: str, data: Any) -> NDArray[Any]:
    values = np.array(data, dtype=object)
    if not all(type(value) is int for value in values.ravel()):
        raise _wrong(name, "UINT64", data)
    try:
        return values.astype(np.uint64)
    except OverflowError:
        raise _wrong(name, "UINT64", data) from None


def _with_nan(name: str, datatype: str, values: NDArray[Any]) -> NDArray[Any]:
    flat = values.ravel().tolist()
    if not all(value is None or type(value) in (int, float) for value in flat):
        raise _wrong(name, datatype, flat)
    try:
        return np.array([math.nan if value is None else float(value) for value in flat])
    except OverflowError:
        raise _wrong(name, datatype, flat) from None


def _texts(name: str, data: Any) -> NDArray[Any]:
    flat: list[Any] = []
    pending = [data]
    while pending:
        item = pending.pop()
        if isinstance(item, list):
            pending.extend(reversed(item))
        elif item is None or isinstance(item, str):
            flat.append(item)
        else:
            raise _wrong(name, "BYTES", item)
    values = np.empty(len(flat), dtype=object)
    values[:] = flat
    return values


def _split_bytes(name: str, elements: int, raw: memoryview) -> NDArray[Any]:
    # Each element takes 4 bytes at least, so that a claim beyond that costs no memory.
    if elements * 4 > len(raw):
        raise InputError(f"tensor {name!r}: {elements} BYTES do not fit in {len(raw)} bytes")
    values = np.empty(elements, dtype=object)
    at = 0
    for i in range(elements):
        size = int.from_bytes(raw[at : at + 4], "little")
        end = at + 4 + size
        if end > len(raw):
            raise InputError(f"tensor {name!r}: BYTES element {i} ends beyond the data")
        values[i] = bytes(raw[at + 4 : end])
        at = end
    if at != len(raw):
        raise InputError(f"tensor {name!r}: {len(raw) - at} bytes behind the last BYTES element")
    return values


def _objects(name: str, kind: ColumnType, values: NDArray[Any]) -> NDArray[Any]:
    """A column of text, times or free-form values from BYTES."""
    if values.dtype.kind != "O":
        raise InputError(f"tensor {name!r}: expected BYTES, got {_NAMES.get(str(values.dtype))}")
    made = np.empty(len(values), dtype=object)
    for i, value in enumerate(values.tolist()):
        made[i] = _object(name, i, kind, value)
    return made.astype("datetime64[us]") if kind.dtype == "datetime64[us]" else made


def _object(name: str, row: int, kind: ColumnType, value: Any) -> Any:
    if value is None:
        return None
    try:
        text = value.decode() if isinstance(value, bytes) else value
        if kind.dtype == "str":
            return text
        if kind.dtype == "any":
            return orjson.loads(text)
        return utc_naive(dt.datetime.fromisoformat(text))
    except UnicodeDecodeError:
        raise InputError(f"tensor {name!r}, row {row}: expected UTF-8 text") from None
    except (ValueError, OverflowError):
        wanted = "JSON" if kind.dtype == "any" else "a time such as '2013-01-31T10:00:00'"
        raise InputError(
            f"tensor {name!r}, row {row}: expected {wanted}, got {str(value)[:60]!r}"
        ) from None


def _wrong(name: str, datatype: str, data: Any) -> InputError:
    return InputError(f"tensor {name!r}: data does not hold {datatype} values: {str(data)[:80]}")
