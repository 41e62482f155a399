"""Ensembles: several nodes' predictions become one column.

``Mean``, ``Vote`` and ``Weighted`` compute; ``Stacking`` asks a meta-model. All read columns by
name, so that only these cross a process edge, and write one: ``output``.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinpath.errors import GraphError, NodeContractError
from twinpath.graph.columns import Columns
from twinpath.graph.node import Node


class _Ensemble(Node):
    """Reads ``columns``, at least one, and writes ``output``. Raises GraphError for a bad list."""

    def __init__(self, columns: Sequence[str], output: str, reads: str, writes: str) -> None:
        kind = type(self).__name__
        if isinstance(columns, str) or not columns:
            raise GraphError(f"{kind} needs a list of at least one column, got {columns!r}")
        repeated = [name for i, name in enumerate(columns) if name in columns[:i]]
        if repeated:
            raise GraphError(f"{kind} names column {repeated[0]!r} twice")
        self.columns = tuple(columns)
        self.output = output
        # Declared by instance: which columns they are is known only here.
        self.inputs = dict.fromkeys(self.columns, reads)  # type: ignore[misc]
        self.outputs = {output: writes}  # type: ignore[misc]

    def _stacked(self, columns: Columns) -> NDArray[Any]:
        """The members' values, shape (n, members)."""
        return np.stack([columns[name] for name in self.columns], axis=1)


class Mean(_Ensemble):
    """The mean of the members, float64. A member's NaN (a branch not taken) does not count."""

    def __init__(self, columns: Sequence[str], output: str) -> None:
        super().__init__(columns, output, "float64", "float64")

    def predict(self, columns: Columns) -> Columns:
        """``output``: float64 (n,); NaN where every member is NaN."""
        return {self.output: _weighted_mean(self._stacked(columns), np.ones(len(self.columns)))}


class Weighted(_Ensemble):
    """The weighted mean of the members, float64; weights by column need not add up to 1.

    A member's NaN does not count, and neither does its weight. Raises GraphError for weights
    that are negative, not finite, or all zero.
    """

    def __init__(self, weights: Mapping[str, float], output: str) -> None:
        super().__init__(list(weights), output, "float64", "float64")
        self.weights = np.array(list(weights.values()), dtype=np.float64)
        if not (np.isfinite(self.weights).all() and (self.weights >= 0).all()):
            raise GraphError(f"Weighted needs finite weights of 0 or more, got {dict(weights)!r}")
        if not self.weights.any():
            raise GraphError(f"Weighted needs a weight over 0, got {dict(weights)!r}")

    def predict(self, columns: Columns) -> Columns:
        """``output``: float64 (n,); NaN where no member with a weight has a value."""
        return {self.output: _weighted_mean(self._stacked(columns), self.weights)}


class Vote(_Ensemble):
    """The value that most members gave; of equally many votes, that of the earliest member.

    ``kind`` is the type of the members' columns, and of the output: "str", "int64" or "bool".
    A member's None does not vote.
    """

    def __init__(self, columns: Sequence[str], output: str, kind: str = "str") -> None:
        super().__init__(columns, output, kind, kind)

    def predict(self, columns: Columns) -> Columns:
        """``output``: shape (n,); None where no member voted."""
        ballots = self._stacked(columns)
        voted = (
            ballots != np.array(None) if ballots.dtype == object else np.ones(ballots.shape, bool)
        )
        # For each member, how many members gave the same value: (n, members).
        votes = (ballots[:, :, None] == ballots[:, None, :]).sum(axis=2) * voted
        winner = votes.argmax(axis=1)  # the first of equals
        return {self.output: ballots[np.arange(len(ballots)), winner]}


class Stacking(_Ensemble):
    """A meta-model over the members.

    ``meta`` is an estimator with ``predict_proba`` (its last class' probability is the output) or
    ``predict``, given (n, members) float64; or a function of that array; or a Node, which is given
    the Columns and returns ``output``. Raises GraphError for anything else.
    """

    def __init__(self, columns: Sequence[str], output: str, meta: Any) -> None:
        super().__init__(columns, output, "float64", "float64")
        if not (hasattr(meta, "predict") or hasattr(meta, "predict_proba") or callable(meta)):
            raise GraphError(
                f"Stacking needs a meta-model with predict, or a function; got {meta!r}"
            )
        self.meta = meta

    def setup(self) -> None:
        """Set the meta-model up, if it is a Node."""
        if isinstance(self.meta, Node):
            self.meta.setup()

    def teardown(self) -> None:
        """Tear the meta-model down, if it is a Node."""
        if isinstance(self.meta, Node):
            self.meta.teardown()

    def predict(self, columns: Columns) -> Columns | Awaitable[Columns]:
        """``output``: float64 (n,). Raises NodeContractError for a meta-model's other shape."""
        if isinstance(self.meta, Node):
            return self.meta.predict(columns)
        members = self._stacked(columns)
        model: Callable[[NDArray[Any]], Any] = getattr(
            self.meta, "predict_proba", getattr(self.meta, "predict", self.meta)
        )
        values = np.asarray(model(members))
        if hasattr(self.meta, "predict_proba") and values.ndim == 2:
            values = values[:, -1]
        if values.shape != (len(members),) or values.dtype.kind not in "fiub":
            raise NodeContractError(
                f"the meta-model of Stacking({self.output!r}) must give one number a row: "
                f"expected shape ({len(members)},), got {values.dtype}{values.shape}"
            )
        return {self.output: values.astype(np.float64)}


def _weighted_mean(values: NDArray[Any], weights: NDArray[Any]) -> NDArray[Any]:
    """(n, members) and (members,) → (n,), without NaN members."""
    given = ~np.isnan(values)
    total = (given * weights).sum(axis=1)
    summed = (np.where(given, values, 0.0) * weights).sum(axis=1)
    means = np.full(len(values), np.nan)
    np.divide(summed, total, out=means, where=total > 0)
    return means
