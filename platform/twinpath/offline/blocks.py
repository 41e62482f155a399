"""A batch under way, as one flat block that Ray Data can carry from stage to stage.

A column that a later stage reads is stored once under ``name@origin``, whatever number of
handles see it; ``rows@step`` says which rows a branch has, and ``__error__`` why a row failed.
Which handle sees which origin follows from the plan alone, so blocks carry no description.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from twinpath.graph.columns import ROW_ERROR, Columns, RowError
from twinpath.graph.frames import Frame, State
from twinpath.graph.plan import INPUT, Plan


@dataclass(frozen=True)
class View:
    """What a handle sees: column name → origin, and origins whose columns are not declared."""

    named: dict[str, int]
    open: tuple[int, ...]


def views(plan: Plan) -> dict[int, View]:
    """The view of every step; mirrors how frames merge and how nodes write."""
    found = {INPUT: View(dict.fromkeys(plan.input_schema.fields, INPUT), ())}
    for step in plan.steps:
        named: dict[str, int] = {}
        for source in step.sources:
            for name, origin in found[source].named.items():
                named[name] = origin if named.get(name, origin) == origin else step.id
        opened = tuple(dict.fromkeys(o for source in step.sources for o in found[source].open))
        if step.node is not None and step.outputs is None:
            found[step.id] = View({}, (step.id,))
        else:
            found[step.id] = View(named | dict.fromkeys(step.outputs or {}, step.id), opened)
    return found


def live_after(plan: Plan, stage: int) -> tuple[int, ...]:
    """Ids of the handles that stages after ``stage``, or the output, still read."""
    done = {INPUT}.union(*({s.id for s in part.steps} for part in plan.stages[: stage + 1]))
    read = {*plan.results, *(leaving.source for leaving in plan.exits)}
    for part in plan.stages[stage + 1 :]:
        for step in part.steps:
            read.update(step.sources)
    return tuple(sorted(done & read))


def encode(state: State, handles: Iterable[int]) -> Columns:
    """The frames of these handles as one block of ``state.n`` rows."""
    block: Columns = {}
    for handle in handles:
        frame = state.frames[handle]
        whole = len(frame.rows) == state.n
        if not whole:
            held = np.zeros(state.n, dtype=bool)
            held[frame.rows] = True
            block[f"rows@{handle}"] = held
        else:
            block[f"rows@{handle}"] = np.ones(state.n, dtype=bool)
        for name, values in frame.columns.items():
            key = f"{name}@{frame.origins[name]}"
            if whole:
                block[key] = values
                continue
            spread = block.get(key)
            if spread is None:
                spread = np.zeros((state.n, *values.shape[1:]), dtype=values.dtype)
                if values.dtype == object:
                    spread[:] = None
            elif not spread.flags.writeable or spread.base is not None:
                spread = spread.copy()
            spread[frame.rows] = values
            block[key] = spread
    block[ROW_ERROR] = encode_errors(state.errors, state.n)
    return block


def decode(block: Columns, plan: Plan, handles: Iterable[int]) -> State:
    """The state that :func:`encode` was given."""
    errors = decode_errors(block[ROW_ERROR])
    state = State(len(block[ROW_ERROR]), {}, errors)
    seen = views(plan)
    for handle in handles:
        rows = np.flatnonzero(block[f"rows@{handle}"])
        whole = len(rows) == state.n
        origins = dict(seen[handle].named)
        for origin in seen[handle].open:
            for key in block:
                name, _, suffix = key.rpartition("@")
                if suffix == str(origin) and name != "rows":
                    origins.setdefault(name, origin)
        columns: Columns = {}
        for name, origin in origins.items():
            values = block.get(f"{name}@{origin}")
            if values is not None:
                columns[name] = values if whole else values[rows]
        state.frames[handle] = Frame(rows, columns, {n: origins[n] for n in columns})
    return state


def to_arrow(block: Columns) -> Any:
    """The block as an Arrow table where every column is plain: numbers, times, or text with
    nulls. Ray's own conversion, which looks at every text, is left the others (tensors, objects).
    """
    import pyarrow as pa

    arrays = {}
    for name, values in block.items():
        if values.ndim != 1:
            return block
        kind = None
        if values.dtype == object:
            if not set(map(type, values.tolist())) <= {str, type(None)}:
                return block
            kind = pa.string()
        arrays[name] = pa.array(values, kind)
    return pa.table(arrays)


def encode_errors(errors: dict[int, RowError], n: int) -> np.ndarray:
    """Object array of n: JSON text for a row that failed, None for the others."""
    column = np.full(n, None, dtype=object)
    for row, error in errors.items():
        column[row] = json.dumps(asdict(error))
    return column


def decode_errors(column: np.ndarray) -> dict[int, RowError]:
    """Row → error, for :func:`encode_errors`' column (None and NaN both mean no error)."""
    if column.dtype != object:
        return {}
    failed = ((i, text) for i, text in enumerate(column) if isinstance(text, str) and text)
    return {i: RowError(**json.loads(text)) for i, text in failed}
