"""Typed edges of a graph: a pydantic model read as columns, checked by row or by column."""

import datetime as dt
import enum
import json
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from twinpath.errors import EmptyBodyError, GraphError, InputError, MalformedBodyError, did_you_mean
from twinpath.graph.columns import Columns, Outcome, RowError, row_count, take
from twinpath.graph.dtypes import ColumnType, type_of

_SCALARS = {float: "float64", int: "int64", bool: "bool", str: "str", dt.datetime: "datetime64[us]"}
_BOUNDS: dict[str, Callable[[Any, Any], Any]] = {
    "ge": np.greater_equal, "gt": np.greater, "le": np.less_equal, "lt": np.less,
}  # fmt: skip


class _Field:
    """One field as a column: its type, whether null is allowed, and its vectorised checks."""

    def __init__(self, name: str, info: FieldInfo) -> None:
        annotation = info.annotation
        arguments = get_args(annotation)
        self.name = name
        self.optional = type(None) in arguments and get_origin(annotation) in (
            Union,
            types.UnionType,
        )
        inner = [a for a in arguments if a is not type(None)] if self.optional else [annotation]
        self.choices: set[Any] | None = None
        kind: Any = inner[0] if len(inner) == 1 else object
        if get_origin(kind) is Literal:
            self.choices = set(get_args(kind))
            kind = type(get_args(kind)[0])
        elif isinstance(kind, type) and issubclass(kind, enum.Enum):
            self.choices = {member.value for member in kind}
            kind = type(next(iter(self.choices)))
        self.type = ColumnType(_SCALARS.get(kind, "any"), () if kind in _SCALARS else None)
        #: An Optional int travels as float64, so that NaN can stand for null.
        self.whole = self.optional and kind is int
        if self.optional and not self.type.has_gap:
            self.type = ColumnType("float64") if kind is int else ColumnType("any", None)
        self.bounds = [
            (op, bound) for meta in info.metadata for op in _BOUNDS
            if (bound := getattr(meta, op, None)) is not None
        ]  # fmt: skip
        plain = all(any(hasattr(m, op) for op in _BOUNDS) for m in info.metadata)
        #: Whether `failures` checks all that pydantic would check.
        self.vectorised = plain and self.type.dtype != "any"

    def failures(self, values: NDArray[Any]) -> dict[int, str]:
        """Position → what is wrong there."""
        wrong: dict[int, str] = {}
        if self.type.dtype == "str":
            for i, value in enumerate(values):
                if not (isinstance(value, str) or (self.optional and value is None)):
                    wrong[i] = f"expected text, got {value!r}"
            if self.choices is not None:
                for i, value in enumerate(values):
                    if i not in wrong and value is not None and value not in self.choices:
                        wrong[i] = f"expected one of {sorted(self.choices)}, got {value!r}"
            return wrong
        missing = values != values if values.dtype.kind in "fM" else np.zeros(len(values), bool)
        if not self.optional:
            for i in np.flatnonzero(missing):
                wrong[int(i)] = "expected a number, got NaN; only an Optional field may be null"
        if values.dtype.kind == "f":
            for i in np.flatnonzero(np.isinf(values)):
                wrong[int(i)] = f"expected a finite number, got {values[i]!r}"
        for op, bound in self.bounds:
            for i in np.flatnonzero(~(_BOUNDS[op](values, bound) | missing)):
                wrong[int(i)] = f"expected {op} {bound!r}, got {values[i].item()!r}"
        if self.choices is not None:
            for i in np.flatnonzero(~(np.isin(values, list(self.choices)) | missing)):
                wrong[int(i)] = f"expected one of {sorted(self.choices)}, got {values[i].item()!r}"
        return wrong


class Schema:
    """The columns of a pydantic model, and the ways in and out of them.

    Raises GraphError when ``model`` is not a pydantic model with fields.
    """

    def __init__(self, model: type[BaseModel], what: str) -> None:
        if not (isinstance(model, type) and issubclass(model, BaseModel) and model.model_fields):
            raise GraphError(f"{what} must be a pydantic model with fields; got {model!r}")
        self.model = model
        self._fields = {name: _Field(name, info) for name, info in model.model_fields.items()}
        self._rows = TypeAdapter(list[model])  # type: ignore[valid-type]
        self._by_row = bool(
            model.__pydantic_decorators__.field_validators
            or model.__pydantic_decorators__.model_validators
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return Schema, (self.model, "the model")

    @property
    def fields(self) -> Mapping[str, ColumnType]:
        """Column name → type."""
        return {name: field.type for name, field in self._fields.items()}

    def defaults(self) -> dict[str, Any]:
        """Column name → value of the fields that need not be given."""
        infos = self.model.model_fields.items()
        return {name: info.get_default() for name, info in infos if not info.is_required()}

    def from_json_rows(self, body: bytes) -> Outcome:
        """``{"rows": [{...}]}`` as columns. Raises EmptyBodyError or MalformedBodyError."""
        if not body.strip():
            raise EmptyBodyError('the body is empty: send {"rows": [{...}]}')
        try:
            document = json.loads(body, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise MalformedBodyError(f"the body is not JSON: {error}") from None
        rows = document.get("rows") if isinstance(document, dict) else None
        if not isinstance(rows, list):
            raise MalformedBodyError(
                f'expected {{"rows": [{{...}}]}}, got {str(document)[:80]!r}: put the rows in a '
                'list under "rows"'
            )
        unknown = sorted(set(document) - {"rows"})
        if unknown:
            raise MalformedBodyError(f"unknown key {unknown[0]!r} beside 'rows': remove it")
        if not rows:
            raise EmptyBodyError('"rows" is an empty list: send at least one row')
        return self.from_rows(rows)

    def from_rows(self, rows: Sequence[Any]) -> Outcome:
        """Rows (mappings or models), each validated by pydantic, as columns of the valid ones."""
        unknown = self._unknown_fields(rows)
        plain = [row.model_dump() if isinstance(row, BaseModel) else row for row in rows]
        good: list[Any]
        errors: dict[int, RowError] = {}
        try:
            good = self._rows.validate_python(plain)
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                row, *where = detail["loc"]
                errors.setdefault(int(row), _row_error(detail["msg"], where, detail["input"]))
            keep = [row for i, row in enumerate(plain) if i not in errors]
            good = self._rows.validate_python(keep)
        positions = np.array([i for i in range(len(rows)) if i not in errors], dtype=np.int64)
        columns = {name: self._column(field, good) for name, field in self._fields.items()}
        outcome = Outcome(len(rows), columns, positions, errors)
        found = self._failures(columns)
        renumbered = {int(positions[i]): error for i, error in found.items()}
        return _without(outcome, unknown | renumbered)

    def from_columns(self, columns: Columns) -> Outcome:
        """Columns checked against the model. Raises InputError for a missing, unknown or
        wrongly typed column; a bad value is its row's error."""
        n = row_count(columns)
        for name in columns:
            if name not in self._fields:
                raise InputError(f"unknown column {name!r}.{did_you_mean(name, self._fields)}")
        defaults = self.defaults()
        taken: Columns = {}
        for name, field in self._fields.items():
            if name not in columns:
                if name not in defaults:
                    raise InputError(
                        f"column {name!r} is missing: expected {field.type}; "
                        f"given: {', '.join(map(repr, columns)) or 'none'}"
                    )
                taken[name] = field.type.filled(n, defaults[name])
                continue
            values = np.asarray(columns[name])
            if len(values) != n:
                raise InputError(f"column {name!r} has {len(values)} rows, the first one has {n}")
            conformed = self._conform(field, values)
            if conformed is None:
                raise InputError(
                    f"column {name!r}: expected {field.type}, got {type_of(values)}: cast it first"
                )
            taken[name] = conformed
        if self._by_row or not all(field.vectorised for field in self._fields.values()):
            return self.from_rows(self.to_rows(taken))
        return _without(Outcome.success(taken, n), self._failures(taken))

    def from_frame(self, frame: Any) -> Outcome:
        """A pandas DataFrame; see :meth:`from_columns`. NaN in a text column is null."""
        columns: Columns = {}
        for name in frame.columns:
            values = frame[name].to_numpy()
            field = self._fields.get(name)
            if field is not None and field.type.dtype == "str":
                series = frame[name].astype(object)
                values = series.where(series.notna(), None).to_numpy(dtype=object)
            columns[str(name)] = values
        return self.from_columns(columns)

    def check_output(self, columns: Columns) -> dict[int, RowError]:
        """Rows whose values the model does not allow (NaN in a field that is not Optional, …)."""
        return self._failures(columns, "row_failed")

    def to_rows(self, columns: Columns) -> list[dict[str, Any]]:
        """Python values by row; NaN, NaT and None of a column are None."""
        lists = [_python_values(columns[name], self._fields.get(name)) for name in columns]
        return [dict(zip(columns, row, strict=True)) for row in zip(*lists, strict=True)]

    def _conform(self, field: _Field, values: NDArray[Any]) -> NDArray[Any] | None:
        if field.optional and field.type.dtype == "float64" and values.dtype.kind in "iu":
            return values.astype(np.float64)
        return field.type.conform(values)

    def _failures(self, columns: Columns, code: str = InputError.code) -> dict[int, RowError]:
        errors: dict[int, RowError] = {}
        for name, field in self._fields.items():
            if field.type.dtype == "any":
                continue
            for row, text in field.failures(columns[name]).items():
                errors.setdefault(row, RowError(code, f"{name}: {text}", None, name))
        return errors

    def _unknown_fields(self, rows: Sequence[Any]) -> dict[int, RowError]:
        if self.model.model_config.get("extra") == "allow":
            return {}
        errors = {}
        for i, row in enumerate(rows):
            if isinstance(row, Mapping) and not row.keys() <= self._fields.keys():
                name = next(str(key) for key in row if key not in self._fields)
                text = f"{name}: unknown field.{did_you_mean(name, self._fields)}"
                errors[i] = RowError(InputError.code, text, None, name)
        return errors

    def _column(self, field: _Field, models: list[Any]) -> NDArray[Any]:
        values = [getattr(model, field.name) for model in models]
        if field.choices is not None:
            values = [v.value if isinstance(v, enum.Enum) else v for v in values]
        if field.type.dtype in ("str", "any"):
            array = np.empty(len(values), dtype=object)
            array[:] = values
            return array
        if field.type.dtype.startswith("datetime"):
            values = [_utc_naive(value) for value in values]
        return np.array(values, dtype=field.type.numpy_dtype)


def _utc_naive(value: dt.datetime | None) -> dt.datetime | None:
    """numpy times have no zone: a zoned time is brought to UTC first."""
    if value is None or value.tzinfo is None:
        return value
    return value.astimezone(dt.UTC).replace(tzinfo=None)


def _refuse_constant(name: str) -> Any:
    raise MalformedBodyError(f"{name} is not JSON: send null, if the field is Optional")


def _row_error(message: str, where: Sequence[Any], given: Any) -> RowError:
    field = ".".join(map(str, where)) or None
    text = f"{field or 'row'}: {message}"
    if message != "Field required":
        text += f", got {str(given)[:80]!r}"
    return RowError(InputError.code, text, None, field)


def _without(outcome: Outcome, errors: dict[int, RowError]) -> Outcome:
    """The outcome less the rows in ``errors``, which count in positions 0..n-1."""
    if not errors:
        return outcome
    keep = ~np.isin(outcome.rows, list(errors))
    columns = take(outcome.columns, np.flatnonzero(keep))
    return Outcome(outcome.n, columns, outcome.rows[keep], outcome.errors | errors)


def _python_values(values: NDArray[Any], field: _Field | None) -> list[Any]:
    listed: list[Any] = values.tolist()
    if values.dtype.kind == "f":
        whole = field is not None and field.whole
        listed = [None if v != v else int(v) if whole else v for v in listed]
    return listed
