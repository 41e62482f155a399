"""JSON to columns and back, for every protocol whose bodies are JSON rows.

The quick way reads and validates a whole body in compiled code: the fields of the input model as
a typed dictionary, without an object of the model for each row. It answers only what is right in
every row. For everything else (a bad row, a model with code of its own) the schema decides, row
by row, with the same result as in every other runtime.

JSON is strict: NaN and Infinity are refused on the way in and null on the way out.
"""

import contextlib
import datetime as dt
import json
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from itertools import chain, repeat
from typing import Any

import numpy as np
import orjson
import pydantic_core
from numpy.typing import NDArray
from pydantic import BaseModel
from pydantic_core import CoreSchema, SchemaValidator, core_schema

from twinpath.errors import EmptyBodyError, MalformedBodyError, NodeContractError
from twinpath.graph.columns import Columns, Outcome
from twinpath.graph.dtypes import ColumnType
from twinpath.graph.fields import MAX_WHOLE, Field, plain_value
from twinpath.graph.schema import Schema

_CONSTANTS = (b"NaN", b"Infinity")
_TEXTS = {str, type(None)}
#: Up to here microseconds survive the way through a float of seconds, to the last one.
_EXACT_S = 2.0**51 / 1e6


class RowReader:
    """Rows of one schema out of JSON bodies; ``key`` is where a body has its list of rows."""

    def __init__(self, schema: Schema, key: str = "rows") -> None:
        self._schema = schema
        self._fields = [Field(name, info) for name, info in schema.model.model_fields.items()]
        self._names = tuple(schema.fields)
        self._tensors = any(field.tensor for field in self._fields)
        self._bounded = [field for field in self._fields if field.bounds]
        self._floats_only = all(_plain_float(field) for field in self._fields)
        self._body: SchemaValidator | None = None
        row = _row_schema(schema.model, self._fields)
        if row is not None:
            rows = core_schema.list_schema(row, min_length=1)
            self._rows = SchemaValidator(rows)
            self._body = SchemaValidator(
                core_schema.typed_dict_schema(
                    {key: core_schema.typed_dict_field(rows)}, extra_behavior="forbid"
                )
            )
        self._key = key

    def quick(self, body: bytes) -> Outcome | None:
        """A body that holds nothing but good rows; None when it has to be looked at closely."""
        if self._body is None or any(constant in body for constant in _CONSTANTS):
            return None
        try:
            if self._floats_only:
                document = orjson.loads(body)
                outcome = self._numbers(document[self._key]) if len(document) == 1 else None
                if outcome is not None:
                    return outcome
            return self._outcome(self._body.validate_json(body)[self._key])
        except Exception:
            return None

    def rows(self, rows: list[Any]) -> Outcome:
        """Rows that were read already. The same as `Schema.from_rows`, quicker."""
        return self._good_rows(rows) or self._schema.from_rows(rows)

    def columns(self, lists: Mapping[str, Any]) -> Outcome:
        """Lists of values by column that were read already. Raises InputError for columns that
        do not fit; a bad value is its row's error."""
        if not self._tensors and all(type(values) is list for values in lists.values()):
            with contextlib.suppress(ValueError):  # lists of different lengths
                outcome = self._good_rows(rows_of(lists))
                if outcome is not None:
                    return outcome
        return self._schema.from_columns(columns_of(self._schema, lists))

    def _good_rows(self, rows: list[Any]) -> Outcome | None:
        """None unless every row is right."""
        if self._body is None:
            return None
        try:
            outcome = self._numbers(rows) if self._floats_only else None
            return outcome or self._outcome(self._rows.validate_python(rows))
        except Exception:
            return None

    def _numbers(self, rows: list[dict[str, Any]]) -> Outcome | None:
        """Rows of nothing but numbers, which have every field in the same order: these need no
        look at each value."""
        names = tuple(rows[0])
        if names != self._names and set(names) != set(self._names):
            return None
        if not all(map(names.__eq__, map(tuple, rows))):
            return None
        numbers = list(chain.from_iterable(map(dict.values, rows)))
        if not set(map(type, numbers)) <= {float, int}:
            return None
        block = np.array(numbers, np.float64)
        if not np.isfinite(block).all():
            return None
        block = np.ascontiguousarray(block.reshape(len(rows), -1).T)
        columns = dict(zip(names, block, strict=True))
        if names != self._names:
            columns = {name: columns[name] for name in self._names}
        if any(field.failures(columns[field.name]) for field in self._bounded):
            return None
        return Outcome.success(columns, len(rows))

    def _outcome(self, rows: list[dict[str, Any]]) -> Outcome | None:
        """Validated rows, whose values are in the order of the fields, as columns."""
        n = len(rows)
        columns: Columns = {}
        lists = zip(*map(dict.values, rows), strict=True)
        for field, values in zip(self._fields, lists, strict=True):
            column = _column(field, values)
            if column is None:
                return None
            columns[field.name] = column
        return Outcome.success(columns, n)


def read_json(body: bytes) -> Any:
    """The document of a body. Raises EmptyBodyError or MalformedBodyError."""
    if not body.strip():
        raise EmptyBodyError("the body is empty: send JSON")
    try:
        return pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        reason = error
    with contextlib.suppress(ValueError, RecursionError):
        json.loads(body, parse_constant=_refuse_constant)
    raise MalformedBodyError(f"the body is not JSON: {reason}")


def read_object(body: bytes, expected: str) -> dict[str, Any]:
    """The same for a body that has to be a JSON object; ``expected`` shows one."""
    document = read_json(body)
    if not isinstance(document, dict):
        raise MalformedBodyError(f"expected {expected}, got {shown(document)}")
    return document


def shown(value: Any) -> str:
    """The start of a value, for error texts."""
    try:
        return repr(value)[:80]
    except ValueError:  # a whole number too long to be printed
        return f"a {type(value).__name__}"


def columns_of(schema: Schema, lists: Mapping[str, Any]) -> Columns:
    """JSON lists by column as arrays, for `Schema.from_columns`, which judges what they hold.

    Values that numpy reads as another type than the column's are left as objects: those are then
    validated one by one, as the values of rows are. Raises MalformedBodyError for a column that is
    no list or has another length than the first, EmptyBodyError when there are no rows.
    """
    columns: Columns = {}
    n: int | None = None
    for name, values in lists.items():
        if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
            text = f"column {name!r}: expected a list with one value a row, got {shown(values)}"
            raise MalformedBodyError(text)
        n = len(values) if n is None else n
        if len(values) != n:
            text = f"column {name!r} has {len(values)} rows, the first column has {n}"
            raise MalformedBodyError(f"{text}: send as many for each")
        columns[name] = _array(values, schema.fields.get(name, ColumnType("any", None)))
    if not n:
        raise EmptyBodyError("there are no rows: send at least one")
    return columns


def dumps(document: Any) -> bytes:
    """Strict JSON; NaN and infinities are null. Raises NodeContractError for what JSON lacks."""
    try:
        return orjson.dumps(document, default=_plain, option=orjson.OPT_SERIALIZE_NUMPY)
    except TypeError as error:
        raise NodeContractError(f"an output cannot be written as JSON: {error}") from None


class RowWriter:
    """Columns of one schema as values that :func:`dumps` writes."""

    def __init__(self, schema: Schema) -> None:
        infos = schema.model.model_fields.items()
        self._whole = {name for name, info in infos if Field(name, info).whole}

    def rows(self, columns: Columns) -> list[dict[str, Any]]:
        """One mapping a row. A missing number is left as NaN, which is null in JSON."""
        return rows_of(self.lists(columns))

    def lists(self, columns: Columns) -> dict[str, list[Any]]:
        """The same by column."""
        lists: dict[str, list[Any]] = {name: values.tolist() for name, values in columns.items()}
        for name in self._whole & columns.keys():
            lists[name] = [None if v != v else int(v) for v in lists[name]]
        return lists


def rows_of(lists: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    """Lists by column as one mapping a row."""
    return list(map(dict, map(zip, repeat(tuple(lists)), zip(*lists.values(), strict=True))))


def bare_input(schema: Schema) -> str | None:
    """The input that a value without a name is for: the only one, or the only one that has to be
    given. None if there is no such input."""
    required = schema.fields.keys() - schema.defaults().keys()
    names = required if len(schema.fields) > 1 else schema.fields.keys()
    return next(iter(names)) if len(names) == 1 else None


def _row_schema(model: type[BaseModel], fields: Iterable[Field]) -> CoreSchema | None:
    """The model's fields as a typed dictionary. None for a model with code of its own, which only
    an object of it would run, and for one that is built in a way not known here."""
    decorators = model.__pydantic_decorators__
    schema: Any = model.__pydantic_core_schema__
    if (
        decorators.field_validators
        or decorators.model_validators
        or decorators.validators
        or decorators.root_validators
        or model.__pydantic_post_init__ is not None
        or not isinstance(schema, dict)
        or schema.get("type") != "model"
        or schema.get("custom_init")
        or schema["schema"].get("type") != "model-fields"
    ):
        return None
    inner = schema["schema"]["fields"]
    if list(inner) != [field.name for field in fields]:
        return None
    entries: dict[str, core_schema.TypedDictField] = {}
    for field in fields:
        value = inner[field.name]["schema"]
        entries[field.name] = core_schema.typed_dict_field(
            _tensor_schema(field, value) if field.tensor else value
        )
    loose = model.model_config.get("extra") == "allow"
    return core_schema.typed_dict_schema(
        entries, extra_behavior="ignore" if loose else "forbid", config=schema.get("config")
    )


def _tensor_schema(field: Field, given: Any) -> CoreSchema:
    """Nested lists of plain numbers; the array is made of a whole column at once."""
    made: CoreSchema
    match field.type.numpy_dtype.kind:
        case "f":
            made = core_schema.float_schema(strict=True)
        case "b":
            made = core_schema.bool_schema(strict=True)
        case _:
            made = core_schema.int_schema(strict=True)
    for size in reversed(field.type.shape or ()):
        made = core_schema.list_schema(made, min_length=size, max_length=size, strict=True)
    return {**given, "schema": made} if given["type"] == "default" else made


def _plain_float(field: Field) -> bool:
    plain = field.vectorised and not field.tensor and not field.optional
    return plain and field.type.dtype == "float64" and field.choices is None


def _column(field: Field, values: tuple[Any, ...]) -> NDArray[Any] | None:
    """Validated values as an array; None unless every one is surely what the field allows."""
    kind = field.type.dtype
    if field.tensor:
        return _tensor(field.type, values)
    if kind == "str":
        array = np.empty(len(values), dtype=object)
        array[:] = values if set(map(type, values)) <= _TEXTS else list(map(plain_value, values))
    elif kind == "any":
        array = _objects(map(plain_value, values), len(values))
    elif kind == "datetime64[us]":
        array = _times(values)
    else:
        if field.choices is not None:
            values = tuple(v.value if isinstance(v, Enum) else v for v in values)
        array = np.array(values, dtype=field.type.numpy_dtype)
        if array.dtype.kind == "f" and not _floats_fit(field, array):
            return None
        if field.whole and (np.abs(array) > MAX_WHOLE).any():
            return None
    if not field.vectorised and kind != "any" and field.failures(array):
        return None
    return array


def _floats_fit(field: Field, array: NDArray[Any]) -> bool:
    return bool(np.isfinite(array).all()) or (field.optional and not np.isinf(array).any())


def _tensor(kind: ColumnType, values: tuple[Any, ...]) -> NDArray[Any] | None:
    with np.errstate(over="ignore"):
        array = np.array(values, dtype=kind.numpy_dtype)
    if array.shape != (len(values), *(kind.shape or ())):
        return None
    # Bigger numbers may have been whole ones, which a float rounds in another way.
    return array if array.dtype.kind != "f" or (np.abs(array) < MAX_WHOLE).all() else None


def _array(values: Sequence[Any], kind: ColumnType) -> NDArray[Any]:
    objects = kind.dtype in ("str", "any", "datetime64[us]")
    if not objects:
        try:
            array = np.asarray(values)
        except (ValueError, OverflowError):  # lists of different lengths
            array = np.zeros(0, object)
        wanted = kind.numpy_dtype
        if array.shape == (len(values), *(kind.shape or ())):
            if array.dtype == wanted:
                return array
            if array.dtype.kind == "i" and wanted.kind == "f":
                return array.astype(wanted)
            if array.dtype.kind == "f" and wanted.kind == "f":
                with np.errstate(over="ignore"):
                    return array.astype(wanted)
            if array.dtype.kind in "iu" and wanted.kind in "iu" and _within(array, wanted):
                return array.astype(wanted)
    return _objects(values, len(values))


def _objects(values: Iterable[Any], n: int) -> NDArray[Any]:
    array = np.empty(n, dtype=object)
    for i, value in enumerate(values):
        array[i] = value
    return array


def _times(values: tuple[Any, ...]) -> NDArray[Any]:
    """Times in UTC. Many go by way of seconds, which numpy reads far faster than datetimes."""
    if len(values) > 4 and None not in values:
        seconds = np.array(
            [(v if v.tzinfo else v.replace(tzinfo=dt.UTC)).timestamp() for v in values]
        )
        if (np.abs(seconds) < _EXACT_S).all():
            return np.rint(seconds * 1e6).astype(np.int64).view("datetime64[us]")
    return np.array([plain_value(value) for value in values], dtype="datetime64[us]")


def _within(array: NDArray[Any], wanted: np.dtype[Any]) -> bool:
    limits = np.iinfo(wanted)
    return not array.size or bool(array.min() >= limits.min and array.max() <= limits.max)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a value of type {type(value).__name__}")


def _refuse_constant(name: str) -> Any:
    raise MalformedBodyError(f"{name} is not JSON: send null, if the field is Optional")
