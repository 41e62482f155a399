"""Node: a model class with ``predict(Columns) -> Columns``; and the handles that wire nodes."""

import copy
from collections.abc import Awaitable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self, runtime_checkable

from twinpath.errors import GraphError
from twinpath.graph.columns import Columns
from twinpath.graph.dtypes import ColumnType
from twinpath.graph.expressions import Where
from twinpath.graph.placement import Batch, Placement, Replicas

if TYPE_CHECKING:
    from twinpath.graph.graph import Handle


#: When a batch job reads features: as they were at each row's moment, or as they are now.
FeatureTime = Literal["as_of", "now"]


@runtime_checkable
class Predicts(Protocol):
    """What qualifies as a node: any object with ``predict``."""

    def predict(self, columns: Columns) -> Columns | Awaitable[Columns]:
        """n rows in, n rows out."""


class Node:
    """Base class of nodes. Subclassing is optional: it adds wiring by call and safe pickling.

    ``inputs`` and ``outputs`` map column names to types (``{"x": "float32[30]"}``). What is
    declared is checked where the graph is written and where the data flows, and lets the compiler
    drop dead columns; None means "everything" and "unknown".

    ``predict`` returns only new or replaced columns; whatever was there upstream stays visible
    downstream. It may be ``async``. To fail single rows it returns the column ``ROW_ERROR``
    (object array, None or a text for each row). A node with ``pins`` is given the versions that
    requests ask for, where any does, as the column ``graph.columns.PIN``.

    A node pickles as the arguments of its constructor, whatever ``setup`` loaded.
    """

    inputs: ClassVar[Mapping[str, str] | None] = None
    outputs: ClassVar[Mapping[str, str] | None] = None

    pins: ClassVar[bool] = False

    _arguments: tuple[tuple[Any, ...], dict[str, Any]]
    _placement: Placement | None

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Remember the arguments, past ``__setattr__``: frozen dataclasses are nodes too."""
        self = super().__new__(cls)
        object.__setattr__(self, "_arguments", (args, kwargs))
        object.__setattr__(self, "_placement", None)
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), *self._arguments, self._placement)

    def setup(self) -> None:
        """Load what is heavy (weights, connections). Runs once in each process, before predict."""

    def predict(self, columns: Columns) -> Columns | Awaitable[Columns]:
        """New columns for n rows, each of leading length n."""
        raise GraphError(f"{type(self).__name__} has no predict(columns) method: write one")

    def teardown(self) -> None:
        """Release what ``setup`` took."""

    def offline(self, features: FeatureTime = "as_of") -> "Node":
        """The node that takes this one's place in a batch job: itself, unless it has a better way
        for many rows. It reads and writes the same columns."""
        return self

    def on(
        self,
        *,
        num_cpus: float | None = None,
        num_gpus: float = 0.0,
        resources: Mapping[str, float] | None = None,
        replicas: Replicas | None = None,
        batch: Batch | None = None,
    ) -> Self:
        """A copy of this node with a placement: own replicas online, own actors offline."""
        placed = copy.copy(self)
        placement = Placement(
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            resources=dict(resources or {}),
            replicas=replicas or Replicas(),
            batch=batch or Batch(),
        )
        object.__setattr__(placed, "_placement", placement)
        return placed

    def __call__(
        self,
        *args: "Handle | str",
        where: Where | str | None = None,
        default: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> "Handle":
        """Wire this node behind ``args``; see :meth:`Graph.add`."""
        from twinpath.graph.graph import active_graph

        return active_graph(args).add(self, *args, where=where, default=default, name=name)


def _rebuild(
    cls: type[Node], args: tuple[Any, ...], kwargs: dict[str, Any], placement: Placement | None
) -> Node:
    node = cls(*args, **kwargs)
    object.__setattr__(node, "_placement", placement)
    return node


def placement_of(node: object) -> Placement | None:
    """The placement given by ``.on(...)``, if any."""
    found = getattr(node, "_placement", None)
    return found if isinstance(found, Placement) else None


def declared(node: object, attribute: str, owner: str) -> dict[str, ColumnType] | None:
    """A node's ``inputs`` or ``outputs`` as column types, or None when it declares none."""
    specs = getattr(node, attribute, None)
    if specs is None:
        return None
    if not isinstance(specs, Mapping):
        raise GraphError(
            f"{attribute} of node {owner!r} must map column names to types, "
            f"for example {{'x': 'float64'}}; got {specs!r}"
        )
    try:
        return {name: ColumnType.parse(spec) for name, spec in specs.items()}
    except GraphError as error:
        raise GraphError(f"{attribute} of node {owner!r}: {error}") from None
