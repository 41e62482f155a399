"""Typed edges of a graph: a pydantic model read as columns, checked by row or by column."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, TypeAdapter, ValidationError

from twinpath.errors import EmptyBodyError, GraphError, InputError, MalformedBodyError, did_you_mean
from twinpath.graph.columns import Columns, Outcome, RowError, row_count, take
from twinpath.graph.dtypes import ColumnType, type_of
from twinpath.graph.fields import MAX_WHOLE, Field, by_value, plain_value


class Schema:
    """The columns of a pydantic model, and the ways in and out of them.

    Raises GraphError when ``model`` is not a pydantic model with fields.
    """

    def __init__(self, model: type[BaseModel], what: str) -> None:
        if not (isinstance(model, type) and issubclass(model, BaseModel) and model.model_fields):
            raise GraphError(f"{what} must be a pydantic model with fields; got {model!r}")
        self.model = model
        renamed = [name for name, info in model.model_fields.items() if info.validation_alias]
        if renamed:
            raise GraphError(f"{what}: field {renamed[0]!r} has an alias; name it as its column")
        self._fields = {name: Field(name, info) for name, info in model.model_fields.items()}
        self._rows = TypeAdapter(list[model])  # type: ignore[valid-type]
        self._by_row = bool(
            model.__pydantic_decorators__.field_validators
            or model.__pydantic_decorators__.model_validators
        )

        #: dtype and shape of each column, if nothing else of any of them is checked.
        self._tensors: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] | None = None
        if all(field.tensor for field in self._fields.values()) and not self._by_row:
            self._tensors = {
                name: (field.type.numpy_dtype, field.type.shape or ())
                for name, field in self._fields.items()
            }

    def __reduce__(self) -> tuple[Any, ...]:
        return Schema, (self.model, "the model")

    @property
    def fields(self) -> Mapping[str, ColumnType]:
        """Column name → type."""
        return {name: field.type for name, field in self._fields.items()}

    @property
    def only_tensors(self) -> bool:
        """Whether of every column nothing but its dtype and shape is checked."""
        return self._tensors is not None

    def defaults(self) -> dict[str, Any]:
        """Column name → value of the fields that need not be given."""
        infos = self.model.model_fields.items()
        return {
            name: plain_value(info.get_default(call_default_factory=True, validated_data={}))
            for name, info in infos
            if not info.is_required()
        }

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
        errors: dict[int, RowError] = {}
        try:
            good = self._rows.validate_python(plain)
        except Exception:
            good = []
            for i, row in enumerate(plain):
                try:
                    good.append(self.model.model_validate(row))
                except ValidationError as error:
                    detail = error.errors(include_url=False)[0]
                    errors[i] = _row_error(detail["msg"], detail["loc"], detail["input"])
                except Exception as error:  # a validator of the model failed in its own way
                    errors[i] = RowError(InputError.code, f"row: {type(error).__name__}: {error}")
        columns: Columns = {}
        positions = np.array([i for i in range(len(rows)) if i not in errors], dtype=np.int64)
        too_big: dict[int, RowError] = {}
        for name, field in self._fields.items():
            columns[name], beyond = self._column(field, good)
            for i, text in beyond.items():
                error_text = f"{name}: {text}"
                too_big.setdefault(
                    int(positions[i]), RowError(InputError.code, error_text, None, name)
                )
        outcome = Outcome(len(rows), columns, positions, errors)
        found = {int(positions[i]): error for i, error in self._failures(columns).items()}
        return _without(outcome, found | too_big | unknown)

    def from_columns(self, columns: Columns) -> Outcome:
        """Columns checked against the model. Raises InputError for a missing, unknown or
        wrongly typed column; a bad value is its row's error."""
        if self._tensors is not None and self._fit(columns):
            return Outcome.success(columns, row_count(columns))
        n = len(np.atleast_1d(next(iter(columns.values()), np.zeros(0))))
        by_row = self._by_row or not all(field.vectorised for field in self._fields.values())
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
                if self.model.model_fields[name].default_factory is not None:
                    by_row = True  # each row gets its own
                else:
                    taken[name] = field.type.filled(n, defaults[name])
                continue
            values = np.asarray(columns[name])
            if values.ndim == 0 or len(values) != n:
                raise InputError(
                    f"column {name!r} has shape {values.shape}, the first one has {n} rows"
                )
            if by_value(field, values):
                by_row = True
                taken[name] = values
                continue
            conformed = self._conform(field, values)
            if conformed is None:
                raise InputError(
                    f"column {name!r}: expected {field.type}, got {type_of(values)}: cast it first"
                )
            taken[name] = conformed
        if by_row:
            return self.from_rows(self.to_rows(taken) if taken else [{}] * n)
        return _without(Outcome.success(taken, n), self._failures(taken))

    def from_frame(self, frame: Any) -> Outcome:
        """A pandas or polars DataFrame; see :meth:`from_columns`. Its missing values are null."""
        columns: Columns = {}
        for name in frame.columns:
            series = frame[name]
            zone = getattr(series.dtype, "tz", None) or getattr(series.dtype, "time_zone", None)
            values = np.asarray(series.to_numpy()) if zone is None else None
            if values is None or values.dtype.kind == "O":
                values = np.empty(len(series), dtype=object)
                for i, value in enumerate(series.to_list()):
                    values[i] = None if _missing(value) else value
            columns[str(name)] = values
        return self.from_columns(columns)

    def check_output(self, columns: Columns) -> dict[int, RowError]:
        """Rows whose values the model does not allow (NaN in a field that is not Optional, …)."""
        return self._failures(columns, "row_failed")

    def to_rows(self, columns: Columns) -> list[dict[str, Any]]:
        """Python values by row; NaN, NaT and None of a column are None."""
        lists = [_python_values(columns[name], self._fields.get(name)) for name in columns]
        return [dict(zip(columns, row, strict=True)) for row in zip(*lists, strict=True)]

    def _fit(self, columns: Columns) -> bool:
        """Whether all columns are there and need no further look."""
        n = row_count(columns)
        wanted = self._tensors
        if wanted is None or columns.keys() != wanted.keys():
            return False
        for name, values in columns.items():
            dtype, shape = wanted[name]
            if values.dtype != dtype or values.shape != (n, *shape):
                return False
        return True

    def _conform(self, field: Field, values: NDArray[Any]) -> NDArray[Any] | None:
        if field.type.dtype == "float64" and values.dtype.kind in "iu" and values.ndim == 1:
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

    def _column(self, field: Field, models: list[Any]) -> tuple[NDArray[Any], dict[int, str]]:
        """The field of these models as an array, and positions whose value no column can hold."""
        values = [getattr(model, field.name) for model in models]
        beyond: dict[int, str] = {}
        if field.choices is not None or field.type.dtype in ("any", "datetime64[us]"):
            for i, value in enumerate(values):
                try:
                    values[i] = plain_value(value)
                except OverflowError:
                    beyond[i] = f"expected a time of the years 1 to 9999 in UTC, got {value}"
                    values[i] = None
        if field.type.dtype in ("str", "any"):
            array = np.empty(len(values), dtype=object)
            for i, value in enumerate(values):
                array[i] = value
            return array, beyond
        if field.tensor:
            shape = field.type.shape or ()
            array = np.empty((len(values), *shape), dtype=field.type.numpy_dtype)
            for i, value in enumerate(values):
                array[i] = value
            return array, beyond
        if field.type.dtype == "int64" or field.whole:
            limit = int(MAX_WHOLE) if field.whole else 2**63 - 1
            for i, value in enumerate(values):
                if value is not None and not -limit - 1 <= value <= limit:
                    beyond[i] = f"expected a whole number of at most {limit}, got a bigger one"
                    values[i] = 0
        return np.array(values, dtype=field.type.numpy_dtype), beyond


def _missing(value: Any) -> bool:
    """None, NaN, pandas' NA and NaT."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, float) and value != value


def _refuse_constant(name: str) -> Any:
    raise MalformedBodyError(f"{name} is not JSON: send null, if the field is Optional")


def _row_error(message: str, where: Sequence[Any], given: Any) -> RowError:
    field = ".".join(map(str, where)) or None
    text = f"{field or 'row'}: {message}"
    if message != "Field required":
        text += f", got {_shown(given)}"
    return RowError(InputError.code, text, None, field)


def _shown(given: Any) -> str:
    """The start of a value; its type for one that cannot be printed (a whole number too long)."""
    try:
        return repr(str(given)[:80])
    except Exception:
        return f"a {type(given).__name__}"


def _without(outcome: Outcome, errors: dict[int, RowError]) -> Outcome:
    """The outcome less the rows in ``errors``, which count in positions 0..n-1."""
    if not errors:
        return outcome
    keep = ~np.isin(outcome.rows, list(errors))
    columns = take(outcome.columns, np.flatnonzero(keep))
    return Outcome(outcome.n, columns, outcome.rows[keep], outcome.errors | errors)


def _python_values(values: NDArray[Any], field: Field | None) -> list[Any]:
    listed: list[Any] = values.tolist()
    if values.dtype.kind == "f":
        whole = field is not None and field.whole
        listed = [None if v != v else int(v) if whole else v for v in listed]
    return listed
