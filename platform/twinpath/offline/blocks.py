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
    """What a handle may see: column name → the origins that it may have, and origins whose columns
    are not declared. Where two handles merge and one of them is undeclared, the plan does not know
    whether both give a column, and so whether the merge is its origin: the first origin is right
    whose column a block has."""

    named: dict[str, tuple[int, ...]]
    open: tuple[int, ...]


def views(plan: Plan) -> dict[int, View]:
    """The view of every step; mirrors how frames merge and how nodes write."""
    found = {INPUT: View(dict.fromkeys(plan.input_schema.fields, (INPUT,)), ())}
    for step in plan.steps:
        if step.node is not None and step.outputs is None:
            found[step.id] = View({}, (step.id,))
            continue
        seen = _merged([found[source] for source in step.sources], step.id)
        written = dict.fromkeys(step.outputs or {}, (step.id,))
        found[step.id] = View(seen.named | written, seen.open)
    return found


def _merged(parts: list[View], at: int) -> View:
    """What the union of handles sees, whose columns of more than one origin have ``at``."""
    if all(part == parts[0] for part in parts):
        return parts[0]
    named: dict[str, tuple[int, ...]] = {}
    for name in dict.fromkeys(name for part in parts for name in part.named):
        given = [part.named[name] for part in parts if name in part.named]
        others = [part.open for part in parts if name not in part.named and part.open]
        if not others and all(origins == given[0] for origins in given):
            named[name] = given[0]
        else:
            named[name] = (at, *dict.fromkeys(o for origins in (*given, *others) for o in origins))
    opened = tuple(dict.fromkeys(origin for part in parts for origin in part.open))
    return View(named, (at, *opened) if len(opened) > 1 else opened)


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
        origins: dict[str, int] = {}
        for name, possible in seen[handle].named.items():
            origin = next((o for o in possible if f"{name}@{o}" in block), None)
            if origin is not None:
                origins[name] = origin
        for origin in seen[handle].open:
            for key in block:
                name, _, suffix = key.rpartition("@")
                if suffix == str(origin) and name != "rows":
                    origins.setdefault(name, origin)
        columns = {name: block[f"{name}@{origin}"] for name, origin in origins.items()}
        if not whole:
            columns = {name: values[rows] for name, values in columns.items()}
        state.frames[handle] = Frame(rows, columns, origins)
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
