"""The registry models of a plan: what a controller watches, and where it finds their registry."""

from dataclasses import dataclass
from typing import Any

from twinpath.graph.plan import Plan

#: The command by which a node is known to count what its versions answer.
REPORTS = "drain_reports"


@dataclass(frozen=True, slots=True)
class WatchedNode:
    """One node: its name in the graph, its registered model, and its registry."""

    node: str
    model: str
    tracking_uri: str | None


def reports(node: Any) -> bool:
    """Whether a node counts what its versions answer."""
    return REPORTS in getattr(node, "commands", ())


def watched_nodes(plan: Plan) -> tuple[WatchedNode, ...]:
    """The nodes of a plan whose models may be rolled out."""
    return tuple(
        WatchedNode(step.name, step.node.name, step.node.tracking_uri)
        for step in plan.steps
        if step.node is not None and reports(step.node)
    )
