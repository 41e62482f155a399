"""What a plan becomes: stages, edges, and the columns that cross from process to process."""

from dataclasses import asdict, dataclass
from typing import Any

from twinpath.graph.drawing import condition_text
from twinpath.graph.placement import Placement
from twinpath.graph.plan import INPUT, Plan, Stage

UNDECLARED = "declare inputs on the node, and only those columns cross"


@dataclass(frozen=True, slots=True)
class StageRow:
    """One stage: its nodes, and what runs it online and offline."""

    index: int
    nodes: tuple[str, ...]
    placed: bool
    replicas: tuple[int, int]
    target_queue: float
    max_batch: int
    max_wait_ms: float
    online: str
    offline: str


@dataclass(frozen=True, slots=True)
class EdgeRow:
    """One edge. ``where`` is the condition on it, None if every row takes it."""

    source: str
    target: str
    where: str | None


@dataclass(frozen=True, slots=True)
class CrossingRow:
    """What a placed node's process is sent and returns, once a batch; None: all columns."""

    node: str
    sends: tuple[str, ...] | None
    returns: tuple[str, ...] | None
    hint: str | None


@dataclass(frozen=True, slots=True)
class Explanation:
    """A plan in words. ``dead_inputs`` are input columns that nothing reads: they are dropped."""

    graph: str
    stages: tuple[StageRow, ...]
    edges: tuple[EdgeRow, ...]
    crossings: tuple[CrossingRow, ...]
    dead_inputs: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def explain(plan: Plan) -> Explanation:
    """Read a plan; nothing is set up or run."""
    names = {INPUT: "input"} | {step.id: step.name for step in plan.steps}
    edges = [
        EdgeRow(
            names[source],
            step.name,
            None if step.where is None else condition_text(step.where),
        )
        for step in plan.steps
        for source in step.sources
    ]
    edges += [
        EdgeRow(names[leaving.source], "output (early exit)", condition_text(leaving.where))
        for leaving in plan.exits
    ]
    edges += [EdgeRow(names[source], "output", None) for source in plan.results]
    crossings = [
        CrossingRow(step.name, step.sends, step.returns, UNDECLARED if step.sends is None else None)
        for step in plan.placed
    ]
    live = plan.live_input
    dead = () if live is None else tuple(n for n in plan.input_schema.fields if n not in live)
    stages = tuple(_stage_row(plan, stage) for stage in plan.stages)
    return Explanation(plan.graph_name, stages, tuple(edges), tuple(crossings), dead)


def _stage_row(plan: Plan, stage: Stage) -> StageRow:
    settings = stage.placement or plan.placement
    replicas = settings.replicas
    if stage.placement is None:
        online = f"inside the ingress deployment {plan.graph_name!r}"
        offline = "map_batches, one actor for each CPU"
    else:
        resources = _resources(stage.placement)
        online = f"Serve deployment {stage.steps[0].name!r}{resources}"
        offline = f"map_batches, own actor pool{resources}"
    return StageRow(
        stage.index,
        tuple(step.name for step in stage.steps if step.node is not None),
        stage.placement is not None,
        (replicas.min, replicas.max),
        replicas.target_queue,
        settings.batch.max_size,
        settings.batch.max_wait_ms,
        online,
        offline,
    )


def _resources(placement: Placement) -> str:
    amounts = {"GPU": placement.num_gpus, "CPU": placement.num_cpus, **placement.resources}
    parts = [f"{amount:g} {name}" for name, amount in amounts.items() if amount]
    return f" ({', '.join(parts)})" if parts else ""
