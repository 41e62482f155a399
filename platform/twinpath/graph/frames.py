"""Frames: the columns that a handle has while a batch runs, and how branches of rows merge.

Every column remembers its origin, the step that wrote it. Merging two frames takes, row by row,
the value of the later origin; a row that no frame has is filled with the writer's default.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from twinpath.graph.columns import Columns, RowError, Rows, positions
from twinpath.graph.plan import INPUT, Names, Plan, Step


@dataclass(slots=True)
class Frame:
    """Columns for some rows of a batch.

    #: ``rows`` is ascending; every column has len(rows); ``origins`` has the same keys.
    """

    rows: Rows
    columns: Columns
    origins: dict[str, int]

    def only(self, names: Names) -> "Frame":
        """The frame with only these columns."""
        if names is None:
            return self
        kept = {name: values for name, values in self.columns.items() if name in names}
        return Frame(self.rows, kept, self.origins)

    def at(self, keep: Rows) -> "Frame":
        """The frame at these positions of its own rows."""
        if len(keep) == len(self.rows):
            return self
        columns = {name: values[keep] for name, values in self.columns.items()}
        return Frame(self.rows[keep], columns, self.origins)


@dataclass(slots=True)
class State:
    """A batch under way: frames by step id, the rows that have failed, remarks, and seconds and
    notes by node."""

    n: int
    frames: dict[int, Frame] = field(default_factory=dict)
    errors: dict[int, RowError] = field(default_factory=dict)
    nodes_s: dict[str, float] = field(default_factory=dict)
    remarks: dict[str, str] = field(default_factory=dict)
    notes: dict[str, tuple[Rows, Columns]] = field(default_factory=dict)
    #: The version that each row asks for, None or text; None when no row asks for any.
    pins: np.ndarray | None = None

    def fail(self, rows: Rows, errors: dict[int, RowError]) -> None:
        """Record errors by position in ``rows``; a row's first error stays."""
        for position, error in errors.items():
            self.errors.setdefault(int(rows[position]), error)

    def alive(self, frame: Frame) -> Frame:
        """The frame without rows that have failed anywhere."""
        if not self.errors:
            return frame
        return frame.at(np.flatnonzero(~np.isin(frame.rows, list(self.errors))))


Fill = Callable[[str, int, int], np.ndarray]


def merge(frames: Sequence[Frame], at: int, fill: Fill) -> Frame:
    """The union of the frames' rows and columns.

    ``at`` is the origin given to a column that more than one origin feeds; ``fill(name, origin,
    n)`` makes the values for rows that no frame has.
    """
    if len(frames) == 1:
        return frames[0]
    first = frames[0].rows
    same = all(f.rows is first or np.array_equal(f.rows, first) for f in frames[1:])
    rows = first if same else _union([f.rows for f in frames])
    columns: Columns = {}
    origins: dict[str, int] = {}
    for name in dict.fromkeys(name for f in frames for name in f.columns):
        givers = sorted((f for f in frames if name in f.columns), key=lambda f: f.origins[name])
        mixed = len({f.origins[name] for f in givers}) > 1
        origins[name] = at if mixed else givers[-1].origins[name]
        full = [f for f in givers if len(f.rows) == len(rows)]
        if full and (full[-1] is givers[-1] or not mixed):
            columns[name] = full[-1].columns[name]
            continue
        values = fill(name, givers[-1].origins[name], len(rows))
        dtypes = {f.columns[name].dtype for f in givers if len(f.rows)}
        if dtypes and values.dtype not in dtypes:
            values = values.astype(np.result_type(values.dtype, *dtypes))
        for giver in givers:
            values[np.searchsorted(rows, giver.rows)] = giver.columns[name]
        columns[name] = values
    return Frame(rows, columns, origins)


def _union(parts: Sequence[Rows]) -> Rows:
    """All row numbers of ascending parts, ascending; without sorting."""
    held = np.zeros(max((int(part[-1]) + 1 for part in parts if len(part)), default=0), dtype=bool)
    for part in parts:
        held[part] = True
    return np.flatnonzero(held)


def gap_fill(plan: Plan, templates: Sequence[Frame]) -> Fill:
    """Fills a column with its writer's ``default=``, or with NaN, NaT or None."""
    steps = {step.id: step for step in plan.steps}
    defaults = {n: v for step in plan.steps for n, v in step.defaults.items()}

    def fill(name: str, origin: int, n: int) -> np.ndarray:
        step: Step | None = steps.get(origin)
        value = (step.defaults if step else {}).get(name, defaults.get(name))
        kinds = (step.outputs or {}) if step else plan.input_schema.fields
        if name in kinds and kinds[name].shape is not None:
            return kinds[name].filled(n, value)
        like = next(f.columns[name] for f in templates if name in f.columns)
        if value is None:
            value = np.nan if like.dtype.kind == "f" else None
        if value is None and like.dtype.kind not in "OM":
            return np.zeros((n, *like.shape[1:]), like.dtype)
        return np.full((n, *like.shape[1:]), value, like.dtype)

    return fill


def input_frame(columns: Columns, n: int, live: Names) -> Frame:
    """The frame of the graph's input."""
    return Frame(positions(n), columns, dict.fromkeys(columns, INPUT)).only(live)
