"""Compiler: a Graph becomes a Plan, the only thing that the runtimes read.

The plan is a list of steps in topological order. A step without a placement is fused with its
neighbours; a step with one runs in its own replicas (online) or actors (offline). Columns that
nobody downstream reads are dropped as early as possible and never cross a process edge.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from twinpath.errors import GraphError, UnknownColumnError, UnknownNodeError, did_you_mean
from twinpath.graph.dtypes import ColumnType
from twinpath.graph.expressions import Where, columns_read
from twinpath.graph.node import FeatureTime, Node
from twinpath.graph.placement import Batch, Placement, Replicas
from twinpath.graph.schema import Schema

#: Names of columns, or None for "all of them".
Names = frozenset[str] | None

#: The id of the graph's input among a step's sources.
INPUT = -1


def union(*names: Names) -> Names:
    """All names of any; None (everything) wins."""
    known = [n for n in names if n is not None]
    return None if len(known) < len(names) else frozenset().union(*known)


@dataclass(frozen=True)
class Step:
    """One node in the plan.

    ``sources`` are ids of earlier steps, or INPUT. ``node`` is None for the rest of an early
    exit, which only lets rows through. ``reads`` are the columns handed to the node, ``writes``
    those it may return, ``live`` those that anything after it still reads; None: all.
    """

    id: int
    name: str
    node: Any
    sources: tuple[int, ...]
    where: Where | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, ColumnType] | None = None
    outputs: Mapping[str, ColumnType] | None = None
    placement: Placement | None = None
    live: Names = None
    parallel: bool = False

    @property
    def reads(self) -> Names:
        """Columns that the node is given."""
        return None if self.inputs is None else frozenset(self.inputs)

    @property
    def writes(self) -> Names:
        """Columns that the node returns."""
        return None if self.outputs is None else frozenset(self.outputs)

    @property
    def sends(self) -> tuple[str, ...] | None:
        """Columns that cross to the node's process."""
        return None if self.reads is None else tuple(sorted(self.reads))

    @property
    def returns(self) -> tuple[str, ...] | None:
        """Columns that come back from it."""
        if self.writes is None or self.live is None:
            return None if self.writes is None else tuple(sorted(self.writes))
        return tuple(sorted(self.writes & self.live))


@dataclass(frozen=True)
class Exit:
    """Rows of ``source`` for which ``where`` holds leave the graph there."""

    source: int
    where: Where


@dataclass(frozen=True)
class Stage:
    """Steps that run together in one process: fused ones, or a single placed one."""

    index: int
    steps: tuple[Step, ...]
    placement: Placement | None

    @property
    def name(self) -> str:
        """The names of its nodes, joined."""
        return "+".join(step.name for step in self.steps)


@dataclass(frozen=True)
class Plan:
    """What the runtimes run. ``results`` are the ids of the steps whose columns are the output."""

    graph_name: str
    input_schema: Schema
    output_schema: Schema
    steps: tuple[Step, ...]
    results: tuple[int, ...]
    exits: tuple[Exit, ...]
    placement: Placement
    live_input: Names

    @property
    def placed(self) -> tuple[Step, ...]:
        """Steps with replicas of their own."""
        return tuple(step for step in self.steps if step.placement is not None)

    @property
    def pinnable(self) -> bool:
        """Whether a request may ask for a version: some node knows what to do with it."""
        return any(getattr(step.node, "pins", False) for step in self.steps)

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """Fused and placed stages in the order in which a batch job runs them."""
        depth: dict[int, int] = {INPUT: 0}
        for step in self.steps:
            before = max(depth[source] for source in step.sources)
            odd = before % 2
            # Fused steps stand at even depths, placed ones at the odd depth after them.
            depth[step.id] = before + (1 if not odd else 2) if step.placement else before + odd
        stages: list[Stage] = []
        for level in sorted(set(depth.values())):
            steps = [step for step in self.steps if depth[step.id] == level]
            groups = [[step] for step in steps] if level % 2 else [steps] if steps else []
            for group in groups:
                stages.append(Stage(len(stages), tuple(group), group[0].placement))
        return tuple(stages)

    def with_placements(
        self, nodes: Mapping[str, Placement | None], ingress: Placement | None = None
    ) -> "Plan":
        """The same plan with other placements by node name (None: fused).

        Raises UnknownNodeError for a name that is no node's.
        """
        names = {step.name for step in self.steps if step.node is not None}
        for name in nodes:
            if name not in names:
                raise UnknownNodeError(
                    f"no node {name!r} in graph {self.graph_name!r}.{did_you_mean(name, names)}"
                )
        steps = [
            replace(step, placement=nodes.get(step.name, step.placement)) for step in self.steps
        ]
        return replace(
            self, steps=_mark_parallel(steps), placement=ingress or self.placement
        )  # fmt: skip

    def offline(self, features: FeatureTime = "as_of") -> "Plan":
        """The same plan with each node's variant for batch jobs (see `Node.offline`)."""
        steps = tuple(
            replace(step, node=step.node.offline(features)) if isinstance(step.node, Node) else step
            for step in self.steps
        )
        return replace(self, steps=steps)


def compile_plan(
    name: str,
    input_schema: Schema,
    output_schema: Schema,
    steps: Sequence[Step],
    results: tuple[int, ...],
    exits: tuple[Exit, ...],
    placement: Placement | None = None,
) -> Plan:
    """Check the wiring and drop what nothing reads.

    ``steps`` are in topological order with ids 0..len-1. Raises UnknownColumnError or GraphError.
    """
    _check_columns(input_schema, output_schema, steps, results, exits)
    kept = _reachable(steps, results, exits)
    wanted = frozenset(output_schema.fields)
    #: What is read of each source's columns by everything after it.
    live: dict[int, Names] = {source: frozenset() for source in (INPUT, *(s.id for s in kept))}
    for source in results:
        live[source] = union(live[source], wanted)
    for leaving in exits:
        live[leaving.source] = union(live[leaving.source], wanted, columns_read(leaving.where))
    pruned: list[Step] = []
    for step in reversed(kept):
        needed = live[step.id]
        pruned.append(replace(step, live=needed))
        through = needed
        # With where= the rows that were not selected keep an earlier value of the same column.
        if through is not None and step.writes is not None and step.where is None:
            through = through - step.writes
        read = step.reads if step.node is not None else frozenset()
        condition = columns_read(step.where) if step.where is not None else frozenset()
        for source in step.sources:
            live[source] = union(live[source], through, read, condition)
    return Plan(
        name, input_schema, output_schema, _mark_parallel(pruned[::-1]), results, exits,
        placement or Placement(replicas=Replicas(), batch=Batch()), live[INPUT],
    )  # fmt: skip


def _reachable(steps: Sequence[Step], results: Iterable[int], exits: Iterable[Exit]) -> list[Step]:
    """Steps that the output depends on, in order; others are dead and do not run."""
    by_id = {step.id: step for step in steps}
    wanted: set[int] = set()
    todo = [*results, *(leaving.source for leaving in exits)]
    while todo:
        current = todo.pop()
        if current != INPUT and current not in wanted:
            wanted.add(current)
            todo.extend(by_id[current].sources)
    return [step for step in steps if step.id in wanted]


def _mark_parallel(steps: Sequence[Step]) -> tuple[Step, ...]:
    """Mark steps that have a sibling which is neither before nor after them."""
    before: dict[int, set[int]] = {INPUT: set()}
    for step in steps:
        before[step.id] = {step.id}.union(*(before[source] for source in step.sources))
    return tuple(
        replace(
            step,
            parallel=any(
                s.id not in before[step.id] and step.id not in before[s.id] for s in steps
            ),
        )
        for step in steps
    )


def _check_columns(
    input_schema: Schema,
    output_schema: Schema,
    steps: Sequence[Step],
    results: Sequence[int],
    exits: Sequence[Exit],
) -> None:
    """Refuse columns that nothing produces, while the graph is written."""
    known: dict[int, tuple[dict[str, ColumnType], bool]] = {
        INPUT: (dict(input_schema.fields), False)
    }
    for step in steps:
        types: dict[str, ColumnType] = {}
        is_open = False
        for source in step.sources:
            types |= known[source][0]
            is_open |= known[source][1]
        names = columns_read(step.where) if step.where is not None else None
        _require(names or (), types, is_open, f"the where= of node {step.name!r} reads")
        _require(step.inputs or (), types, is_open, f"node {step.name!r} reads")
        for name, wanted in (step.inputs or {}).items():
            if name in types and not wanted.accepts(types[name]):
                raise GraphError(
                    f"node {step.name!r}, column {name!r}: expected {wanted}, got {types[name]} "
                    "from upstream: convert it in a node before this one"
                )
        if step.node is not None:
            is_open |= step.outputs is None
            types |= step.outputs or {}
        known[step.id] = (types, is_open)
    required = [n for n in output_schema.fields if n not in output_schema.defaults()]
    for group in (results, *((leaving.source,) for leaving in exits)):
        types = {n: kind for source in group for n, kind in known[source][0].items()}
        is_open = any(known[source][1] for source in group)
        _require(required, types, is_open, "the output needs")
        for name, wanted in output_schema.fields.items():
            if name in types and not wanted.accepts(types[name]):
                raise GraphError(
                    f"the output's column {name!r}: expected {wanted}, got {types[name]} from "
                    "upstream: change the node or the output model"
                )
    for leaving in exits:
        types, is_open = known[leaving.source]
        _require(columns_read(leaving.where) or (), types, is_open, "the where= of an exit reads")


def _require(
    names: Iterable[str], types: Mapping[str, ColumnType], is_open: bool, who: str
) -> None:
    for name in names:
        if name not in types and not is_open:
            raise UnknownColumnError(
                f"{who} column {name!r}, which nothing upstream produces."
                f"{did_you_mean(name, types)}"
            )
