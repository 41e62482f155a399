"""Checks of how nodes are wired: order, cycles, and branches that meet."""

from collections.abc import Iterable, Mapping

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


def check_gaps(steps: list[Step], inputs: Iterable[str]) -> None:
    """Refuse a merge that leaves rows without a value of a column which cannot be null.

    Rows are sets of tokens: INPUT for all of them, or the id of the step whose where= chose them.
    """
    parents: dict[int, frozenset[int]] = {INPUT: frozenset()}
    rows: dict[int, frozenset[int]] = {INPUT: frozenset({INPUT})}
    names: dict[int, set[str]] = {INPUT: set(inputs)}
    defaults = {name for step in steps for name in step.defaults}

    def covers(given: frozenset[int], token: int) -> bool:
        above = parents[token]
        return token in given or (bool(above) and all(covers(given, t) for t in above))

    for step in steps:
        merged = frozenset().union(*(rows[source] for source in step.sources))
        names[step.id] = set().union(*(names[source] for source in step.sources))
        for name in sorted(names[step.id] - defaults):
            given = frozenset().union(*(rows[s] for s in step.sources if name in names[s]))
            if all(covers(given, token) for token in merged):
                continue
            for writer in steps[: steps.index(step)]:
                kind = (writer.outputs or {}).get(name)
                if kind is not None and not kind.has_gap:
                    raise GraphError(
                        f"node {writer.name!r} runs on some rows only and writes {name!r} as "
                        f"{kind}, which cannot be null where {step.name!r} merges them with "
                        f"others: give default={{{name!r}: …}}"
                    )
        rows[step.id] = merged
        if step.where is not None:
            parents[step.id], rows[step.id] = merged, frozenset({step.id})
        names[step.id] |= set(step.outputs or ())
