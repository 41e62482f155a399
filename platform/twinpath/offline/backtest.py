"""The backtest on Ray Data: the same rows through incumbent and challenger, compared.

Rows go through the whole graph, features included, twice in one actor; only the registered model
differs. What the graph was captured to have been asked is a source like any other.
"""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from twinpath.errors import BatchJobError, did_you_mean
from twinpath.graph.columns import Columns, Outcome, row_count
from twinpath.graph.local import Driver
from twinpath.graph.plan import Plan
from twinpath.graph.stage import Executor
from twinpath.nodes.pinned import pinned, registry_step
from twinpath.offline.job import FUSED_NUM_CPUS, Job
from twinpath.rollout.backtest import (
    CHALLENGER,
    FAILED_CHALLENGER,
    FAILED_INCUMBENT,
    INCUMBENT,
    LABEL,
    Backtest,
)
from twinpath.rollout.bins import Bins
from twinpath.rollout.recorder import score_of
from twinpath.rollout.state import Thresholds


@dataclass(frozen=True, slots=True)
class BacktestJob:
    """``BacktestJob(plan, "day.parquet", "2", "3").run()``.

    ``source`` is what `Job` reads. ``segments`` and ``label`` are columns of the source (or, for
    segments, of the graph's input); labels are 0 and 1, and null where they are not known.
    ``model`` is needed where the graph has several registered ones. ``workers`` actors each hold
    both versions.
    """

    plan: Plan
    source: Any
    incumbent: str
    challenger: str
    model: str | None = None
    segments: Sequence[str] = ()
    label: str | None = None
    bins: Bins = field(default_factory=Bins)
    thresholds: Thresholds = field(default_factory=Thresholds)
    batch_size: int = 4096
    workers: int = 1

    def run(self) -> Backtest:
        """Score everything. Raises BatchJobError for a source that lacks a column, ConfigError
        for a model that the graph does not have."""
        step = registry_step(self.plan, self.model)
        job = Job(self.plan, self.source, workers=self.workers)
        rows = job.rows()
        schema = rows.schema()
        names = set(schema.names) if schema is not None else set()
        inputs = set(self.plan.input_schema.fields)
        wanted = [*self.segments, *([self.label] if self.label else [])]
        for name in wanted:
            if name not in names and name not in inputs:
                raise BatchJobError(
                    f"the source has no column {name!r}.{did_you_mean(name, names | inputs)}"
                )
        import ray.data

        scored = rows.map_batches(
            PairCall,
            fn_constructor_args=(
                self.plan, step.name, self.incumbent, self.challenger,
                tuple(self.segments), self.label,
            ),
            batch_size=self.batch_size,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(size=self.workers),
            num_cpus=FUSED_NUM_CPUS,
        )  # fmt: skip
        total = Backtest(
            self.incumbent, self.challenger, tuple(self.segments), self.bins, self.thresholds
        )
        for block in scored.iter_batches(batch_size=None, batch_format="numpy"):
            if row_count(block):
                total.add(block)
        return total


class PairCall:
    """Scores blocks with both versions; set up once in each actor."""

    def __init__(
        self,
        plan: Plan,
        node: str,
        incumbent: str,
        challenger: str,
        segments: tuple[str, ...],
        label: str | None,
    ) -> None:
        self._plan, self._node = plan, node
        self._segments, self._label = segments, label
        step = next(each for each in plan.steps if each.name == node)
        self._executors = [
            Executor(pinned(plan, step, version)) for version in (incumbent, challenger)
        ]
        for executor in self._executors:
            executor.setup()
            weakref.finalize(self, executor.teardown)
        self._driver = Driver()

    def __call__(self, block: Columns) -> Columns:
        """Rows that the graph's input refuses are left out: neither version ever sees them."""
        fields = self._plan.input_schema.fields
        checked = self._plan.input_schema.from_columns(
            {name: values for name, values in block.items() if name in fields}
        )
        n = len(checked.rows)
        out: Columns = {}
        for executor, score, failed in zip(
            self._executors,
            (INCUMBENT, CHALLENGER),
            (FAILED_INCUMBENT, FAILED_CHALLENGER),
            strict=True,
        ):
            outcome = self._driver.run(executor.run(dict(checked.columns)), executor.suspends)
            out[score], out[failed] = _scores(outcome, self._node, n)
        for name in self._segments:
            given = block[name][checked.rows] if name in block else checked.columns[name]
            out[name] = np.array([str(value) for value in given.tolist()], object)
        if self._label is not None:
            out[LABEL] = _labels(block, self._label)[checked.rows]
        return out


def _scores(outcome: Outcome, node: str, n: int) -> tuple[Any, Any]:
    """The node's score of each row, and whether it has none although it was asked for one."""
    noted: Mapping[str, tuple[Any, Columns]] = outcome.notes
    scores, failed = np.full(n, np.nan), np.ones(n, bool)
    if node in noted:
        rows, columns = noted[node]
        found = np.asarray(score_of(columns["score"]), np.float64)
        scores[rows] = found
        failed[rows] = ~np.isfinite(found)
    return scores, failed


def _labels(block: Columns, name: str) -> Any:
    given = [np.nan if value is None else float(value) for value in block[name].tolist()]
    return np.array(given, np.float64)
