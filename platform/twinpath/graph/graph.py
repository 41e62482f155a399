"""Graph: immutable wiring of nodes between a typed input and a typed output."""

import importlib
import re
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from twinpath.errors import (
    DuplicateNameError,
    GraphError,
    UnknownNodeError,
    did_you_mean,
)
from twinpath.graph.expressions import Where, as_condition
from twinpath.graph.node import declared, placement_of
from twinpath.graph.placement import Batch, Placement, Replicas
from twinpath.graph.plan import INPUT, Exit, Plan, Step, compile_plan
from twinpath.graph.schema import Schema
from twinpath.graph.wiring import check_gaps, check_merges, topological

if TYPE_CHECKING:
    from twinpath.graph.local import Result

_ACTIVE: ContextVar["Graph | None"] = ContextVar("twinpath_active_graph", default=None)
_NAME = re.compile(r"^[A-Za-z][A-Za-z0-9_-]*$")


@dataclass(frozen=True, eq=False)
class Handle:
    """What a wired node gives: pass it to the next node. ``id`` INPUT is the graph's input."""

    graph: "Graph"
    id: int
    name: str

    def __repr__(self) -> str:
        return f"<{self.name} of graph {self.graph.name}>"


@dataclass(frozen=True)
class _Wire:
    """A node as authored; its sources may be names of nodes that are wired later."""

    step: Step
    sources: tuple[int | str, ...]


def active_graph(args: tuple[Any, ...]) -> "Graph":
    """The graph of the first handle, or the one whose ``with`` block is open."""
    graph = next((arg.graph for arg in args if isinstance(arg, Handle)), _ACTIVE.get())
    if graph is None:
        raise GraphError("a node is wired inside 'with graph as rows:': open the graph first")
    return graph


class Graph:
    """``with Graph(name, input=…, output=…) as rows:`` wires nodes; leaving the block freezes it.

    ``replicas`` and ``batch`` are those of the ingress, which runs all fused nodes. Raises
    GraphError (or one of its subclasses) for wiring that cannot work.
    """

    def __init__(
        self,
        name: str,
        *,
        input: type[BaseModel],
        output: type[BaseModel],
        replicas: Replicas | None = None,
        batch: Batch | None = None,
    ) -> None:
        _check_name(name, "graph")
        self.name = name
        self.input_model, self.output_model = input, output
        self.input_schema = Schema(input, f"the input of graph {name!r}")
        self.output_schema = Schema(output, f"the output of graph {name!r}")
        self._placement = Placement(replicas=replicas or Replicas(), batch=batch or Batch())
        self._wires: list[_Wire] = []
        self._results: tuple[int | str, ...] = ()
        self._exits: list[Exit] = []
        self._plan: Plan | None = None
        self._runner: Any = None

    def __enter__(self) -> Handle:
        if self._plan is not None:
            raise GraphError(f"graph {self.name!r} is complete and cannot be wired again")
        self._token = _ACTIVE.set(self)
        return Handle(self, INPUT, "input")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        _ACTIVE.reset(self._token)
        if kind is None:
            self._plan = self._compile()

    def __getstate__(self) -> dict[str, Any]:
        """A graph pickles as its wiring, without what a local run has loaded."""
        state = self.__dict__.copy()
        state.pop("_token", None)
        return state | {"_runner": None}

    def add(
        self,
        node: Any,
        *args: Handle | str,
        where: Where | str | None = None,
        default: Mapping[str, Any] | None = None,
        name: str | None = None,
        placement: Placement | None = None,
    ) -> Handle:
        """Wire any object with ``predict`` behind ``args`` (handles, or names of nodes).

        With several ``args`` the node sees the columns of all; where two give the same column
        the one written later in the graph wins, on the rows that it has. ``where`` keeps the rows
        for which it holds; the others get ``default`` for the columns that the node would have
        written (NaN, None).
        """
        if self._plan is not None:
            raise GraphError(f"graph {self.name!r} is complete and cannot be wired again")
        if isinstance(node, type) or not callable(getattr(node, "predict", None)):
            hint = f"create it first: {node.__name__}()" if isinstance(node, type) else ""
            raise GraphError(
                f"{node!r} is no node: expected an object with predict(columns). {hint}"
            )
        name = self._unique(name, node)
        if not args:
            raise GraphError(f"node {name!r} is wired to nothing: call it with a handle")
        outputs = declared(node, "outputs", name)
        if where is not None and outputs is None:
            raise GraphError(
                f"node {name!r} has where=, so it must declare its outputs: rows that do not take "
                "the branch need to know which columns they miss. Add outputs = "
                "{'column': 'float64'}"
            )
        defaults = dict(default or {})
        for column in defaults:
            if outputs is None or column not in outputs:
                raise GraphError(
                    f"default of node {name!r} names column {column!r}, which is not among its "
                    f"outputs.{did_you_mean(column, outputs or ())}"
                )
        for column, kind in (outputs or {}).items():
            if where is not None and column not in defaults and not kind.has_gap:
                raise GraphError(
                    f"node {name!r} has where= and writes {column!r} as {kind}, which cannot be "
                    f"null: give default={{{column!r}: …}} for the rows that skip it"
                )
        step = Step(
            len(self._wires), name, node, (),
            as_condition(where) if where is not None else None, defaults,
            declared(node, "inputs", name), outputs, placement or placement_of(node),
        )  # fmt: skip
        return self._wire(step, args)

    def exit(self, source: Handle, where: Where | str) -> Handle:
        """Early exit: rows for which ``where`` holds leave with the columns they have at
        ``source``. Returns the handle of the rows that stay."""
        condition = as_condition(where)
        name = self._unique(f"rest-{len(self._exits) + 1}", None)
        self._exits.append(Exit(source.id, condition))
        stay = ~condition if not callable(condition) else _Not(condition)
        return self._wire(Step(len(self._wires), name, None, (), stay, {}, None, {}), (source,))

    def output(self, *handles: Handle | str) -> None:
        """The columns of these handles, merged as in :meth:`add`, are the graph's output."""
        if not handles or self._results:
            raise GraphError(f"graph {self.name!r} needs output(...) exactly once, with a handle")
        self._results = tuple(self._reference(handle) for handle in handles)

    @property
    def plan(self) -> Plan:
        """The compiled plan. Raises GraphError while the ``with`` block is open."""
        if self._plan is None:
            raise GraphError(f"graph {self.name!r} is not complete: leave its 'with' block first")
        return self._plan

    def run(self, data: Any) -> "Result":
        """Run in process on rows, a DataFrame or Columns; nodes are set up at the first call."""
        from twinpath.graph.local import LocalRunner

        if self._runner is None:
            self._runner = LocalRunner(self.plan)
        result: Result = self._runner.run(data)
        return result

    def close(self) -> None:
        """Tear down what :meth:`run` has set up."""
        if self._runner is not None:
            self._runner.close()
            self._runner = None

    @property
    def app(self) -> Any:
        """The typed builder for Ray Serve: ``serve run graphs.flights:app``."""
        return importlib.import_module("twinpath.online.builder").build_app_function(self)

    def job(self, source: Any, sink: Any = None, **options: Any) -> Any:
        """A batch job on Ray Data: ``graph.job(source, sink).run()``."""
        return importlib.import_module("twinpath.offline.job").Job(
            self.plan, source, sink, **options
        )

    def draw(self) -> Any:
        """The graph as a drawing: ``.mermaid`` text, ``.svg`` picture; shown in notebooks."""
        from twinpath.graph.drawing import Drawing

        return Drawing(self.plan)

    def _repr_html_(self) -> str:
        return str(self.draw().svg) if self._plan is not None else repr(self)

    def __repr__(self) -> str:
        names = " → ".join(wire.step.name for wire in self._wires if wire.step.node is not None)
        ends = self.input_model.__name__, self.output_model.__name__
        return f"Graph({self.name!r}: {ends[0]} → {names} → {ends[1]})"

    def _wire(self, step: Step, args: tuple[Handle | str, ...]) -> Handle:
        self._wires.append(_Wire(step, tuple(self._reference(arg) for arg in args)))
        return Handle(self, step.id, step.name)

    def _reference(self, arg: Handle | str) -> int | str:
        if isinstance(arg, Handle):
            if arg.graph is not self:
                raise GraphError(f"{arg!r} belongs to another graph than {self.name!r}")
            return arg.id
        if isinstance(arg, str):
            return arg
        raise GraphError(f"expected a handle or a node's name, got {arg!r}")

    def _unique(self, name: str | None, node: Any) -> str:
        taken = {wire.step.name for wire in self._wires}
        if name is not None:
            _check_name(name, "node")
            if name in taken:
                raise DuplicateNameError(f"graph {self.name!r} already has a node {name!r}")
            return name
        kind = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(node).__name__).lower().strip("_")
        return next(n for n in _numbered(kind or "node") if n not in taken)

    def _compile(self) -> Plan:
        if not self._results:
            raise GraphError(f"graph {self.name!r} has no output: call graph.output(handle)")
        ids = {wire.step.name: wire.step.id for wire in self._wires}

        def resolve(reference: int | str) -> int:
            if isinstance(reference, int):
                return reference
            if reference not in ids:
                raise UnknownNodeError(f"no node {reference!r}.{did_you_mean(reference, ids)}")
            return ids[reference]

        sources = {w.step.id: tuple(resolve(s) for s in w.sources) for w in self._wires}
        order = topological(sources, {wire.step.id: wire.step.name for wire in self._wires})
        # From here ids count in topological order: a higher id is never upstream of a lower one,
        # which is what "written later" means when frames merge.
        new = {INPUT: INPUT} | {old: position for position, old in enumerate(order)}
        steps = [
            replace(self._wires[old].step, id=new[old], sources=tuple(new[s] for s in sources[old]))
            for old in order
        ]
        results = tuple(new[resolve(result)] for result in self._results)
        met = [*steps, Step(len(steps), "output", None, results)]
        check_merges(met)
        check_gaps(met, self.input_schema.fields)
        exits = tuple(replace(leaving, source=new[leaving.source]) for leaving in self._exits)
        return compile_plan(
            self.name, self.input_schema, self.output_schema, steps, results,
            exits, self._placement,
        )  # fmt: skip

    def __iter__(self) -> Iterator[Any]:
        raise TypeError("a Graph is not iterable; graph.plan.steps lists its nodes")


class _Not:
    """The negation of a plain condition; a class, so that it pickles."""

    def __init__(self, condition: Any) -> None:
        self.condition = condition

    def __call__(self, columns: Any) -> Any:
        return ~self.condition(columns)


def _numbered(kind: str) -> Iterator[str]:
    yield kind
    number = 2
    while True:
        yield f"{kind}_{number}"
        number += 1


def _check_name(name: str, what: str) -> None:
    if not isinstance(name, str) or not _NAME.match(name):
        raise GraphError(
            f"{name!r} is no {what} name: letters, digits, '_' and '-', starting with a letter"
        )
