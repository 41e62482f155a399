"""From the values of views to the columns of a node: what is missing is filled, views on demand are
computed, columns get their names. Online and offline share this code, so that both agree.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from twinpath.errors import ConfigError, NodeContractError, did_you_mean
from twinpath.features.decode import Nulls, from_objects
from twinpath.features.online import ViewRows
from twinpath.features.spec import OnDemandSpec, ServiceSpec
from twinpath.graph.columns import ROW_ERROR, Columns
from twinpath.graph.dtypes import ColumnType

OnMissing = Literal["default", "null", "error"]


class RowMaker:
    """Makes a service's columns from its views' rows.

    ``on_missing`` says what stands where no value held: "default" gives ``defaults`` (by column),
    or what stands for nothing in that type (NaN, NaT, None, 0, False); "null" gives NaN, NaT or
    None, and integers and booleans become float64; "error" fails the row. Nulls that the view
    itself has get the default too, and are no error. Raises ConfigError for a default that no
    column can have.
    """

    def __init__(
        self,
        spec: ServiceSpec,
        on_missing: OnMissing = "default",
        defaults: Mapping[str, Any] | None = None,
        full_names: bool = False,
    ) -> None:
        self.spec, self._on_missing, self._full_names = spec, on_missing, full_names
        self._kinds = spec.columns(full_names)
        if len(self._kinds) < len(spec.promised):
            seen: set[str] = set()
            twice = next(f for _, f in spec.promised if f in seen or seen.add(f))  # type: ignore[func-returns-value]
            raise ConfigError(
                f"service {spec.name!r} has feature {twice!r} in two views: "
                "pass full_names=True, which names columns view__feature"
            )
        self._defaults = dict(defaults or {})
        for name in self._defaults:
            if name not in self._kinds:
                raise ConfigError(
                    f"defaults name {name!r}, which service {spec.name!r} does not give."
                    f"{did_you_mean(name, self._kinds)}"
                )
            _check_default(name, self._kinds[name], self._defaults[name])

    @property
    def outputs(self) -> dict[str, str]:
        """The columns that are made → their types."""
        return declared_types(self._kinds, self._on_missing)

    def columns(
        self, views: Sequence[ViewRows], given: Columns, n: int, *, lenient: bool = False
    ) -> Columns:
        """The columns for n rows; ``given`` are the columns that came with the request.
        ``lenient`` gives defaults also where "error" was asked for."""
        missing = np.zeros(n, dtype=bool)
        cells: dict[tuple[str, str], tuple[NDArray[Any], Nulls]] = {}
        for rows in views:
            absent = None if rows.found.all() else ~rows.found
            if absent is not None:
                missing |= absent
            for name, kind in rows.view.features.items():
                cells[rows.view.title, name] = _present(rows, name, kind, n, absent)
        for view in self.spec.on_demand:
            cells |= _compute(view, cells, given, n)
        columns: Columns = {}
        for view_name, feature in self.spec.promised:
            name = self.spec.column(view_name, feature, self._full_names)
            values, nulls = cells[view_name, feature]
            columns[name] = self._filled(name, values, nulls)
        if self._on_missing == "error" and not lenient and missing.any():
            columns[ROW_ERROR] = self._errors(views, given, missing)
        return columns

    def nothing(self, given: Columns, n: int) -> Columns:
        """The columns of n rows for which nothing is known."""
        views = [
            ViewRows(view, {}, np.zeros(n, dtype=bool), np.zeros(n, dtype=np.int64))
            for view in self.spec.views
        ]
        return self.columns(views, given, n, lenient=True)

    def _filled(self, name: str, values: NDArray[Any], nulls: Nulls) -> NDArray[Any]:
        """Values with defaults in place of nulls."""
        if self._on_missing == "null":
            if self._kinds[name] not in _WITHOUT_NULL:
                return values
            values = values.astype(np.float64)
            if nulls is not None:
                values[nulls] = np.nan
            return values
        if name in self._defaults:
            marks = _null_rows(values) if nulls is None else nulls
            if marks.any():
                values = values.copy()
                default = self._defaults[name]
                if isinstance(default, list):  # one value, not one for each row
                    for row in np.flatnonzero(marks):
                        values[row] = default
                else:
                    values[marks] = default
        return values

    def _errors(
        self, views: Sequence[ViewRows], given: Columns, missing: NDArray[np.bool_]
    ) -> NDArray[np.object_]:
        errors = np.full(len(missing), None, dtype=object)
        for row in np.flatnonzero(missing).tolist():
            rows = next(rows for rows in views if not rows.found[row])
            keys = ", ".join(
                f"{key}={given[key][row : row + 1].tolist()[0]!r}" for key in rows.view.entity_keys
            )
            errors[row] = f"view {rows.view.title!r} has no features that hold for {keys}"
        return errors


def _check_default(name: str, kind: str, default: Any) -> None:
    """Raises ConfigError for a default that a column of this type cannot hold."""
    dtype = ColumnType.parse(kind).numpy_dtype
    if dtype.kind == "O" or (default is None and dtype.kind in "fmM"):
        return
    try:
        if dtype.kind in "mM":
            held = np.array([default], dtype)
        else:
            held = np.array([default]).astype(dtype, casting="same_kind")
        fits = held.shape == (1,)
    except (TypeError, ValueError, OverflowError):
        fits = False
    if not fits:
        raise ConfigError(f"the default of {name!r} is {default!r}: expected a value of {kind}")


_WITHOUT_NULL = {"int32", "int64", "bool"}


def declared_types(kinds: Mapping[str, str], on_missing: OnMissing) -> dict[str, str]:
    """What a node declares for features of these types."""
    if on_missing != "null":
        return dict(kinds)
    return {name: "float64" if kind in _WITHOUT_NULL else kind for name, kind in kinds.items()}


def _null_rows(values: NDArray[Any]) -> NDArray[np.bool_]:
    if values.dtype.kind == "f":
        return np.asarray(np.isnan(values))
    if values.dtype.kind == "M":
        return np.asarray(np.isnat(values))
    if values.dtype.kind == "O":
        return np.array([value is None for value in values], dtype=bool)
    return np.zeros(len(values), dtype=bool)


def _present(
    rows: ViewRows, name: str, kind: str, n: int, absent: NDArray[np.bool_] | None
) -> tuple[NDArray[Any], Nulls]:
    """One feature, null where no row was found."""
    values = rows.values.get(name)
    if values is None:
        values = ColumnType.parse(kind).filled(n)
        return values, (np.ones(n, dtype=bool) if kind in _WITHOUT_NULL else None)
    nulls = rows.nulls.get(name)
    values, nulls = _typed(values, nulls, kind)
    if absent is None:
        return values, nulls
    values = values.copy()
    values[absent] = ColumnType.parse(kind).filled(1)[0]
    if kind in _WITHOUT_NULL:
        nulls = absent if nulls is None else nulls | absent
    return values, nulls


@cache
def _dtype(kind: str) -> np.dtype[Any]:
    return ColumnType.parse(kind).numpy_dtype


def _typed(values: NDArray[Any], nulls: Nulls, kind: str) -> tuple[NDArray[Any], Nulls]:
    """Values as the column type; a join may give integers with nulls as floats or objects."""
    wanted = _dtype(kind)
    if values.dtype == wanted:
        return values, nulls
    if values.dtype == object:
        return from_objects([None if v is None or v != v else v for v in values.tolist()], kind)
    if kind in _WITHOUT_NULL and values.dtype.kind == "f":
        marks = np.isnan(values)
        return np.where(marks, 0, values).astype(wanted), marks if marks.any() else nulls
    return values.astype(wanted), nulls


def _compute(
    view: OnDemandSpec,
    cells: Mapping[tuple[str, str], tuple[NDArray[Any], Nulls]],
    given: Columns,
    n: int,
) -> dict[tuple[str, str], tuple[NDArray[Any], Nulls]]:
    """The features of a view on demand. It sees NaN for a missing float, None for a missing
    integer, truth value or text. Raises NodeContractError for what is no column of n values."""
    inputs: dict[str, list[Any]] = {}
    for source, feature in view.inputs:
        values, nulls = cells[source, feature]
        listed = values.tolist()
        if nulls is not None:
            for row in np.flatnonzero(nulls).tolist():
                listed[row] = None
        inputs[feature] = listed
        inputs[f"{source}__{feature}"] = listed
    for name in view.request:
        inputs[name] = given[name].tolist()
    if n == 0:
        return {(view.name, f): from_objects([], kind) for f, kind in view.features.items()}
    transformation = view.transformation.feature_transformation
    if view.mode == "python" and getattr(view.transformation, "singleton", False):
        rows = [
            transformation.transform_singleton({name: values[i] for name, values in inputs.items()})
            for i in range(n)
        ]
        answer: Any = {name: [row[name] for row in rows] for name in view.features}
    elif view.mode == "python":
        answer = transformation.transform(inputs)
    else:
        import pandas as pd

        answer = transformation.transform(pd.DataFrame(inputs))
    computed = {}
    for name, kind in view.features.items():
        listed = list(answer[name]) if name in answer else []
        if len(listed) != n:
            raise NodeContractError(
                f"view on demand {view.name!r}, feature {name!r}: expected {n} values, got "
                f"{len(listed)}: its transformation must give one for each row"
            )
        computed[view.name, name] = _from_answer(listed, kind)
    return computed


def _from_answer(values: Sequence[Any], kind: str) -> tuple[NDArray[Any], Nulls]:
    plain = [None if value is None or value != value else value for value in values]
    return from_objects(plain, kind)
