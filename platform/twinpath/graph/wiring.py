"""Checks of how nodes are wired: order, cycles, and branches that meet."""

from collections.abc import Mapping

from twinpath.errors import CycleError, DuplicateNameError, GraphError
from twinpath.graph.plan import INPUT, Step


def topological(sources: Mapping[int, tuple[int, ...]], names: Mapping[int, str]) -> list[int]:
    """Ids so that each comes after its sources. Raises CycleError with the loop spelled out."""
    order: list[int] = []
    path: list[int] = []

    def visit(step: int) -> None:
        if step == INPUT or step in order:
            return
        if step in path:
            loop = [names[i] for i in [*path[path.index(step) :], step]]
            raise CycleError(f"these nodes wait for each other: {' ← '.join(loop)}; cut one edge")
        path.append(step)
        for source in sources[step]:
            visit(source)
        path.pop()
        order.append(step)

    for step in sources:
        visit(step)
    return order


def check_merges(steps: list[Step]) -> None:
    """Refuse two independent branches, both for all rows, that write the same column."""
    by_id = {step.id: step for step in steps}
    before: dict[int, set[int]] = {INPUT: set()}
    for step in steps:
        before[step.id] = {step.id}.union(*(before[s] for s in step.sources))
        for i, left in enumerate(step.sources):
            for right in step.sources[i + 1 :]:
                mine, theirs = before[left] - before[right], before[right] - before[left]
                _check_gaps(step, [by_id[s] for s in sorted(mine)])
                _check_gaps(step, [by_id[s] for s in sorted(theirs)])
                if any(by_id[s].where is not None for s in mine | theirs):
                    continue
                for a in sorted(mine):
                    for b in sorted(theirs):
                        both = set(by_id[a].outputs or ()) & set(by_id[b].outputs or ())
                        if both:
                            raise DuplicateNameError(
                                f"node {step.name!r} merges {by_id[a].name!r} and {by_id[b].name!r}"
                                f", and both write column {min(both)!r}: rename one of them"
                            )


def _check_gaps(merge: Step, branch: list[Step]) -> None:
    """Refuse a branch of some rows that, once merged, leaves a column which cannot be null."""
    if not any(step.where is not None for step in branch):
        return
    first = next(i for i, step in enumerate(branch) if step.where is not None)
    for step in branch[first:]:
        if step.outputs is None and step.node is not None:
            raise GraphError(
                f"node {step.name!r} runs on some rows only and node {merge.name!r} merges them "
                "with others, so it must declare its outputs: add outputs = {'column': 'float64'}"
            )
        for column, kind in (step.outputs or {}).items():
            if column not in step.defaults and not kind.has_gap:
                raise GraphError(
                    f"node {step.name!r} runs on some rows only and writes {column!r} as {kind}, "
                    f"which cannot be null where {merge.name!r} merges them with others: "
                    f"give default={{{column!r}: …}}"
                )
