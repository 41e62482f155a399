"""Columns ↔ a model's signature: mapped once, enforced, and the difference named."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinpath.errors import SignatureError, did_you_mean
from twinpath.graph.columns import Columns, row_count
from twinpath.graph.dtypes import ColumnType, type_of
from twinpath.registry.manifest import ModelColumn, ModelSignature

#: The name of a tensor that has none.
UNNAMED = ""
Types = Mapping[str, ColumnType]


class Binding:
    """How a node's columns become a model's inputs, and a model's answer the node's columns.

    ``given`` are the columns that the node reads; ``wanted`` those that it returns. Raises
    SignatureError with every difference when the model's signature does not fit.
    """

    def __init__(self, signature: ModelSignature, given: Types, wanted: Types) -> None:
        self._wanted = dict(wanted)
        self._only = next(iter(wanted)) if len(wanted) == 1 else None
        inputs = signature.inputs
        #: Columns that are stacked into one unnamed tensor; None: each goes by its own name.
        self._stacked: tuple[str, ...] | None = None
        self._casts: dict[str, np.dtype[Any] | None] = {}
        if inputs is None:
            self._casts = dict.fromkeys(given)
        elif len(inputs) == 1 and inputs[0].name in (None, UNNAMED):
            self._bind_tensor(inputs[0], given)
        else:
            self._bind_columns(inputs, given)
        if signature.outputs is not None:
            self._check_outputs(signature.outputs)

    @property
    def names(self) -> tuple[str, ...]:
        """The columns that the model reads, in its order."""
        return self._stacked if self._stacked is not None else tuple(self._casts)

    def given(self, columns: Columns) -> Columns:
        """The model's inputs of a batch. Raises SignatureError for a column that is not there."""
        try:
            if self._stacked is not None:
                return {UNNAMED: self._tensor(columns, self._stacked)}
            return {
                name: columns[name] if cast is None else columns[name].astype(cast, copy=False)
                for name, cast in self._casts.items()
            }
        except KeyError as error:
            name = str(error.args[0])
            raise SignatureError(
                f"the model reads column {name!r}, which no node upstream returned."
                f"{did_you_mean(name, columns)}"
            ) from None

    def answer(self, raw: Any, n: int) -> Columns:
        """The node's columns of a model's answer: an array of n rows, or arrays by name. Raises
        SignatureError when it is none of the columns that the node returns."""
        by_name = raw if isinstance(raw, Mapping) else None
        if by_name is None:
            if self._only is None:
                raise SignatureError(
                    f"the model returns one array and the node the columns {_names(self._wanted)}: "
                    "declare one output"
                )
            return {self._only: _fitted(self._only, self._wanted[self._only], np.asarray(raw), n)}
        if self._only is not None and self._only not in by_name and len(by_name) == 1:
            by_name = {self._only: next(iter(by_name.values()))}
        found: Columns = {}
        for name, kind in self._wanted.items():
            if name not in by_name:
                raise SignatureError(
                    f"the model returns {_names(by_name)} and not {name!r}."
                    f"{did_you_mean(name, map(str, by_name))}"
                )
            found[name] = _fitted(name, kind, np.asarray(by_name[name]), n)
        return found

    def _bind_tensor(self, tensor: ModelColumn, given: Types) -> None:
        size = tensor.type.shape
        if len(given) == 1:
            ((name, kind),) = given.items()
            if _fits(tensor.type, kind) or (kind.shape == () and size == (1,)):
                self._stacked = (name,)
                return
        scalars = [name for name, kind in given.items() if kind.shape == ()]
        wrong = [n for n in scalars if not _castable(tensor.type, ColumnType(given[n].dtype, ()))]
        if size is not None and len(size) == 1 and size[0] == len(given) == len(scalars):
            if not wrong:
                self._stacked = tuple(given)
                return
            raise SignatureError(
                f"the model reads a tensor of {tensor.type}; column {wrong[0]!r} is "
                f"{given[wrong[0]]}, which does not go into it without loss"
            )
        raise SignatureError(
            f"the model reads one tensor of {tensor.type} a row and the node gives "
            f"{len(given)} columns: {_typed(given)}"
        )

    def _bind_columns(self, inputs: Sequence[ModelColumn], given: Types) -> None:
        problems = []
        for column in inputs:
            name = column.name or UNNAMED
            kind = given.get(name)
            if kind is None:
                if column.required:
                    hint = did_you_mean(name, given)
                    problems.append(f"it reads {name!r} ({column.type}), which is not given.{hint}")
                continue
            if not _fits(column.type, kind):
                problems.append(f"it reads {name!r} as {column.type}, which is given as {kind}")
                continue
            numeric = column.type.dtype not in ("any", "str") and kind.dtype != "any"
            self._casts[name] = column.type.numpy_dtype if numeric else None
        if problems:
            raise SignatureError("the model's inputs are not the node's: " + "; ".join(problems))

    def _check_outputs(self, outputs: Sequence[ModelColumn]) -> None:
        names = [column.name for column in outputs if column.name]
        if len(self._wanted) > 1:
            missing = [name for name in self._wanted if name not in names]
            if missing and names:
                raise SignatureError(
                    f"the node returns {missing[0]!r} and the model {_names(names)}."
                    f"{did_you_mean(missing[0], names)}"
                )

    @staticmethod
    def _tensor(columns: Columns, names: Sequence[str]) -> NDArray[Any]:
        if len(names) == 1:
            values = columns[names[0]]
            return values if values.ndim > 1 else values.reshape(-1, 1)
        return matrix(columns, names)


def types_of(columns: Columns) -> dict[str, ColumnType]:
    """The types of a batch's columns."""
    return {name: type_of(values) for name, values in columns.items()}


def matrix(
    columns: Columns, names: Sequence[str], dtype: np.dtype[Any] | type | None = None
) -> NDArray[Any]:
    """Numeric columns side by side, of shape (n, total width), in the widest of their dtypes unless
    one is given."""
    parts = [columns[name] for name in names]
    if dtype is None:
        dtype = np.result_type(*(part.dtype for part in parts))
    if len(parts) == 1 and parts[0].ndim == 2:
        return parts[0].astype(dtype, copy=False)
    if all(part.ndim == 1 for part in parts):
        block = np.empty((row_count(columns), len(parts)), dtype)
        for i, part in enumerate(parts):
            block[:, i] = part
        return block
    return np.concatenate([np.reshape(p, (len(p), -1)).astype(dtype) for p in parts], axis=1)


def _fitted(name: str, kind: ColumnType, values: NDArray[Any], n: int) -> NDArray[Any]:
    """An array of the model as a column of this type."""
    if values.ndim == 0 or len(values) != n:
        raise SignatureError(
            f"the model's {name!r}: expected {n} rows, got an array of shape {values.shape}"
        )
    if kind.shape == () and values.ndim == 2:
        if values.shape[1] == 1:
            values = values[:, 0]
        elif values.shape[1] == 2 and values.dtype.kind == "f":
            values = values[:, 1]  # the probability of the positive class
    if kind.shape is not None and values.shape[1:] != kind.shape:
        raise SignatureError(
            f"the model's {name!r}: expected {kind}, got {type_of(values)}: declare in outputs= "
            "what it returns"
        )
    if kind.dtype in ("any", "str") or values.dtype == kind.numpy_dtype:
        return values
    numbers = values.dtype.kind in "iuf" and kind.numpy_dtype.kind == "f"
    if numbers or np.can_cast(values.dtype, kind.numpy_dtype, "safe"):
        return values.astype(kind.numpy_dtype)
    if values.dtype.kind in "iub" and kind.numpy_dtype.kind in "iub":
        cast = values.astype(kind.numpy_dtype)
        if np.array_equal(cast, values):
            return cast
    raise SignatureError(f"the model's {name!r}: expected {kind}, got {type_of(values)}")


def _fits(model: ColumnType, given: ColumnType) -> bool:
    if "any" in (model.dtype, given.dtype):
        return True
    if model.shape is not None and given.shape is not None and model.shape != given.shape:
        return False
    return _castable(model, given)


def _castable(model: ColumnType, given: ColumnType) -> bool:
    if model.dtype == given.dtype or "any" in (model.dtype, given.dtype):
        return True
    if "str" in (model.dtype, given.dtype):
        return False
    return bool(np.can_cast(given.numpy_dtype, model.numpy_dtype, "safe"))


def _names(names: Any) -> str:
    return ", ".join(map(repr, names)) or "nothing"


def _typed(types: Types) -> str:
    return ", ".join(f"{name!r} ({kind})" for name, kind in types.items()) or "none"
