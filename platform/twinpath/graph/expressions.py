"""Conditions on columns, for ``where=``: ``col("p").between(0.4, 0.6) & ~col("known")``.

An expression knows which columns it reads, so that the compiler can check and prune them; a
plain callable ``Columns -> bool array`` is accepted as well, and is taken to read every column.
"""

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinpath.errors import GraphError, NodeContractError, RowFailedError, TwinpathError
from twinpath.graph.columns import Columns, RowError, row_count

_Evaluate = Callable[[Columns], NDArray[Any]]


class Expression:
    """A vectorised expression over named columns; shape (n,)."""

    #: Never hashable by value: ``==`` builds an expression.
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, kind: str, parts: tuple[Any, ...], columns: frozenset[str]) -> None:
        self.kind = kind
        self.parts = parts
        self.columns = columns

    def evaluate(self, columns: Columns) -> NDArray[Any]:
        """The expression's value for each row."""
        if self.kind == "column":
            return columns[self.parts[0]]
        values = [p.evaluate(columns) if isinstance(p, Expression) else p for p in self.parts]
        return np.asarray(_OPERATIONS[self.kind](*values))

    def _with(self, kind: str, *others: Any) -> "Expression":
        names = self.columns.union(*(o.columns for o in others if isinstance(o, Expression)))
        return Expression(kind, (self, *others), names)

    def __eq__(self, other: object) -> "Expression":  # type: ignore[override]
        return self._with("==", other)

    def __ne__(self, other: object) -> "Expression":  # type: ignore[override]
        return self._with("!=", other)

    def __lt__(self, other: Any) -> "Expression":
        return self._with("<", other)

    def __le__(self, other: Any) -> "Expression":
        return self._with("<=", other)

    def __gt__(self, other: Any) -> "Expression":
        return self._with(">", other)

    def __ge__(self, other: Any) -> "Expression":
        return self._with(">=", other)

    def __and__(self, other: Any) -> "Expression":
        return self._with("&", other)

    def __or__(self, other: Any) -> "Expression":
        return self._with("|", other)

    def __invert__(self) -> "Expression":
        return self._with("~")

    def __bool__(self) -> bool:
        raise GraphError(
            f"the condition {self} has no truth value while the graph is written: join conditions "
            "with & | ~ (in parentheses) instead of 'and', 'or', 'not' and chained comparisons"
        )

    def between(self, low: Any, high: Any) -> "Expression":
        """``low <= value <= high``."""
        return self._with(">=", low)._with("&", self._with("<=", high))

    def isin(self, values: Any) -> "Expression":
        """Whether the value is one of ``values``."""
        return self._with("in", list(values))

    def is_null(self) -> "Expression":
        """Whether the value is NaN or None."""
        return self._with("null")

    def __repr__(self) -> str:
        texts = [str(part) if isinstance(part, Expression) else repr(part) for part in self.parts]
        if self.kind == "column":
            return str(self.parts[0])
        if len(texts) == 1:
            return f"~{texts[0]}" if self.kind == "~" else f"{texts[0]} is null"
        return f"({texts[0]} {self.kind} {texts[1]})"


def _is_null(values: NDArray[Any]) -> NDArray[Any]:
    if values.dtype.kind == "O":
        return np.fromiter((v is None or v != v for v in values), bool, len(values))
    differs: NDArray[Any] = values != values  # NaN and NaT differ from themselves
    return differs


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le,
    ">": operator.gt, ">=": operator.ge, "&": operator.and_, "|": operator.or_,
    "~": operator.invert, "in": np.isin, "null": _is_null,
}  # fmt: skip


def col(name: str) -> Expression:
    """A column by name, to write conditions with."""
    return Expression("column", (name,), frozenset({name}))


Where = Expression | _Evaluate


def as_condition(where: "Where | str") -> Where:
    """Text is a boolean column's name. Raises GraphError for anything that is no condition."""
    if isinstance(where, str):
        return col(where)
    if isinstance(where, Expression) or callable(where):
        return where
    raise GraphError(
        f"where={where!r} is no condition: expected a boolean column's name, an expression such "
        "as col('p') > 0.5, or a function of Columns that returns a boolean array"
    )


def columns_read(where: Where) -> frozenset[str] | None:
    """The columns that a condition reads; None when it cannot be known (a plain function)."""
    return where.columns if isinstance(where, Expression) else None


def mask(
    where: Where, columns: Columns, node: str
) -> tuple[NDArray[np.bool_], dict[int, RowError]]:
    """The condition for each row, shape (n,) bool, and the rows for which it raises (False).

    Raises NodeContractError for another shape or dtype.
    """
    n = row_count(columns)
    if n == 0:
        return np.zeros(0, dtype=bool), {}
    try:
        values = where.evaluate(columns) if isinstance(where, Expression) else where(columns)
    except TwinpathError:
        raise
    except Exception as error:
        return _bisected(where, columns, node, error)
    if not isinstance(values, np.ndarray) or values.shape != (n,) or values.dtype.kind != "b":
        got = f"{values.dtype}{values.shape}" if isinstance(values, np.ndarray) else repr(values)
        raise NodeContractError(
            f"the where= of node {node!r} must give bool({n},), one value a row; got {got}. "
            "Compare the column, for example col('p') > 0.5"
        )
    return values, {}


def _bisected(
    where: Where, columns: Columns, node: str, error: Exception
) -> tuple[NDArray[np.bool_], dict[int, RowError]]:
    """Halve a batch for which the condition raises until the offending rows stand alone."""
    n = row_count(columns)
    if n == 1:
        text = f"the where= of node {node!r}: {type(error).__name__}: {error}"
        return np.zeros(1, dtype=bool), {0: RowError(RowFailedError.code, text, node)}
    half = n // 2
    left, errors = mask(where, {name: v[:half] for name, v in columns.items()}, node)
    right, more = mask(where, {name: v[half:] for name, v in columns.items()}, node)
    return np.concatenate([left, right]), errors | {half + row: e for row, e in more.items()}
