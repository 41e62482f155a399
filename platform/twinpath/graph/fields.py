"""One field of a pydantic model, read as a column: its type and its vectorised checks."""

import datetime as dt
import enum
import types
from collections.abc import Callable
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import numpy as np
from numpy.typing import NDArray
from pydantic.fields import FieldInfo

from twinpath.errors import GraphError
from twinpath.graph.dtypes import ColumnType
from twinpath.graph.tensors import Tensor

_SCALARS = {float: "float64", int: "int64", bool: "bool", str: "str", dt.datetime: "datetime64[us]"}
_BOUNDS: dict[str, Callable[[Any, Any], Any]] = {
    "ge": np.greater_equal, "gt": np.greater, "le": np.less_equal, "lt": np.less,
}  # fmt: skip


#: Beyond this a float64 cannot hold every whole number.
MAX_WHOLE = 2.0**53


class Field:
    """One field as a column: its type, whether null is allowed, and its vectorised checks."""

    def __init__(self, name: str, info: FieldInfo) -> None:
        self.name = name
        metadata = list(info.metadata)
        annotation: Any = info.annotation
        arguments = get_args(annotation)
        self.optional = type(None) in arguments
        #: Whether a row's value is an array, of which only dtype and shape are checked.
        self.tensor = False
        if get_origin(annotation) in (Union, types.UnionType):
            inner = [argument for argument in arguments if argument is not type(None)]
            annotation = inner[0] if len(inner) == 1 else object
        if get_origin(annotation) is Annotated:
            metadata += annotation.__metadata__
            annotation = get_args(annotation)[0]
        self.choices: set[Any] | None = None
        tensor = next((meta for meta in metadata if isinstance(meta, Tensor)), None)
        if tensor is not None:
            self._set_tensor(tensor)
            return
        kind: Any = annotation
        if get_origin(annotation) is Literal:
            self.optional |= None in get_args(annotation)
            self.choices = {value for value in get_args(annotation) if value is not None}
        elif isinstance(annotation, type) and issubclass(annotation, enum.Enum):
            self.choices = {member.value for member in annotation}
        if self.choices is not None:
            kinds = {type(choice) for choice in self.choices}
            kind = kinds.pop() if len(kinds) == 1 else object
        self.type = ColumnType(_SCALARS.get(kind, "any"), () if kind in _SCALARS else None)
        #: An Optional int travels as float64, so that NaN can stand for null.
        self.whole = self.optional and kind is int
        if self.optional and not self.type.has_gap:
            self.type = ColumnType("float64") if kind is int else ColumnType("any", None)
        self.bounds = [
            (op, utc_naive(bound)) for meta in metadata for op in _BOUNDS
            if (bound := getattr(meta, op, None)) is not None
        ]  # fmt: skip
        self._looks_closer = bool(self.whole or self.bounds or self.choices is not None)
        plain = all(any(hasattr(m, op) for op in _BOUNDS) for m in metadata)
        #: Whether `failures` checks all that pydantic would check.
        self.vectorised = plain and self.type.dtype != "any"

    def _set_tensor(self, tensor: Tensor) -> None:
        if self.optional:
            raise GraphError(f"field {self.name!r}: a Tensor cannot be Optional")
        self.type, self.whole, self.bounds = tensor.type, False, []
        self.tensor = self.vectorised = True

    def failures(self, values: NDArray[Any]) -> dict[int, str]:
        """Position → what is wrong there."""
        wrong: dict[int, str] = {}
        if self.tensor:
            return wrong
        if self.type.dtype == "str":
            return self._wrong_texts(values.tolist())
        if values.dtype.kind == "f" and not self._looks_closer and np.isfinite(values).all():
            return wrong
        missing = values != values if values.dtype.kind in "fM" else np.zeros(len(values), bool)
        if not self.optional:
            for i in np.flatnonzero(missing):
                wrong[int(i)] = "expected a number, got NaN; only an Optional field may be null"
        if values.dtype.kind == "f":
            for i in np.flatnonzero(np.isinf(values)):
                wrong[int(i)] = f"expected a finite number, got {values[i].item()!r}"
        if self.whole:
            for i in np.flatnonzero(~((np.trunc(values) == values) | missing)):
                wrong[int(i)] = f"expected a whole number, got {values[i].item()!r}"
            for i in np.flatnonzero(np.abs(values) > MAX_WHOLE):
                wrong[int(i)] = f"expected at most ±2**53, got {values[i].item()!r}"
        for op, bound in self.bounds:
            for i in np.flatnonzero(~(_BOUNDS[op](values, bound) | missing)):
                wrong[int(i)] = f"expected {op} {bound!r}, got {values[i].item()!r}"
        if self.choices is not None:
            for i in np.flatnonzero(~(np.isin(values, list(self.choices)) | missing)):
                wrong[int(i)] = f"expected one of {sorted(self.choices)}, got {values[i].item()!r}"
        return wrong

    def _wrong_texts(self, values: list[Any]) -> dict[int, str]:
        wrong: dict[int, str] = {}
        allowed = {str, type(None)} if self.optional else {str}
        if not set(map(type, values)) <= allowed:
            for i, value in enumerate(values):
                if not (isinstance(value, str) or (self.optional and value is None)):
                    wrong[i] = f"expected text, got {value!r}"
        if self.choices is not None:
            for i, value in enumerate(values):
                if i not in wrong and value is not None and value not in self.choices:
                    wrong[i] = f"expected one of {sorted(self.choices)}, got {value!r}"
        return wrong


def by_value(field: Field, values: NDArray[Any]) -> bool:
    """Whether the column's values have to be looked at one by one, as those of rows are: objects
    for a number, or the floats that pandas makes of whole numbers with gaps."""
    if field.type.dtype in ("str", "any") or values.ndim != 1:
        return False
    return values.dtype.kind == "O" or (field.type.dtype == "int64" and values.dtype.kind == "f")


def plain_value(value: Any) -> Any:
    """An enum's value, a time without its zone (in UTC); anything else as it is."""
    return utc_naive(value.value if isinstance(value, enum.Enum) else value)


def utc_naive(value: Any) -> Any:
    """numpy times have no zone: a zoned time is brought to UTC first. Other values stay."""
    if not isinstance(value, dt.datetime) or value.tzinfo is None:
        return value
    return value.astimezone(dt.UTC).replace(tzinfo=None)
