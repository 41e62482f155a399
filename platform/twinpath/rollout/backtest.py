"""The backtest: the same rows scored by incumbent and challenger, compared. Pure.

Blocks are added one by one, in any order and from any number of workers, so a data set of any size
fits. All rows are there at once and nobody peeks: a difference fails the backtest when its lower
bound is over the threshold of the guard.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from twinpath.errors import InputError, did_you_mean
from twinpath.graph.columns import Columns
from twinpath.rollout import labels as of
from twinpath.rollout.bins import Bins, Scale, edges_of
from twinpath.rollout.divergence import grouped, kl, psi
from twinpath.rollout.labels import LabelSketch
from twinpath.rollout.recorder import Recorder
from twinpath.rollout.sketch import OTHER, Report, Sketch, Tally
from twinpath.rollout.state import Thresholds

#: Columns of a scored block: scores of both, and if known the label and whether a row failed.
INCUMBENT, CHALLENGER = "score_incumbent", "score_challenger"
LABEL = "label"
FAILED_INCUMBENT, FAILED_CHALLENGER = "failed_incumbent", "failed_challenger"
#: Values of a segment column that are told apart.
SEGMENT_VALUES = 64
#: Rows below which a segment is listed and not judged.
FEW = 50
_DEVIATIONS = 2.0


@dataclass(frozen=True, slots=True)
class Difference:
    """One figure of both versions. ``size`` is the challenger's change for the worse, ``low`` its
    lower bound; None where there is nothing to compare."""

    figure: str
    segment: str
    rows: int
    incumbent: float | None
    challenger: float | None
    size: float | None
    low: float | None
    threshold: float

    @property
    def failed(self) -> bool:
        """Whether it is surely worse, by more than matters, in rows enough."""
        return self.low is not None and self.rows >= FEW and self.low > self.threshold


@dataclass(frozen=True, slots=True)
class BacktestReport:
    """What a backtest found. ``passed`` is the gate; ``reasons`` say what failed."""

    rows: int
    incumbent: str
    challenger: str
    differences: tuple[Difference, ...]
    #: Of rows that both scored: mean and largest absolute change of the score, and the part of the
    #: rows that fall on the other side of 0.5 (of all changed classes, for labels).
    mean_change: float
    largest_change: float
    crossed: float
    passed: bool
    reasons: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def table(self, figure: str = "score PSI") -> list[Difference]:
        """One figure by segment, worst first."""
        chosen = [d for d in self.differences if d.figure == figure and d.segment]
        return sorted(chosen, key=lambda d: -(d.size or 0.0))


@dataclass
class Backtest:
    """Counts of paired scores; :meth:`add` blocks or other backtests, then :meth:`report`."""

    incumbent: str
    challenger: str
    segments: tuple[str, ...] = ()
    bins: Bins = field(default_factory=Bins)
    thresholds: Thresholds = field(default_factory=Thresholds)
    counts: Report = field(init=False)
    labels: dict[str, LabelSketch] = field(init=False)
    #: Rows by the bins of both scores: shape (bins.count, bins.count), incumbent first.
    joint: NDArray[np.int64] = field(init=False)
    changes: list[float] = field(init=False)

    def __post_init__(self) -> None:
        if self.incumbent == self.challenger:
            raise InputError(f"version {self.incumbent!r} is compared with itself")
        self.counts = Report(self.bins)
        self.labels = {name: LabelSketch.empty(self.bins) for name in self._versions}
        self.joint = np.zeros((self.bins.count, self.bins.count), np.int64)
        self.changes = [0.0, 0.0, 0.0, 0.0]  # rows of both, sum, largest, crossed

    @property
    def _versions(self) -> tuple[str, str]:
        return self.incumbent, self.challenger

    def add(self, block: Columns) -> Self:
        """Count n rows: both scores (n,), segment columns, and the optional columns above.

        Raises InputError when a column that is needed is absent.
        """
        for name in (INCUMBENT, CHALLENGER, *self.segments):
            if name not in block:
                raise InputError(f"column {name!r} is not in the block.{did_you_mean(name, block)}")
        n = len(block[INCUMBENT])
        failed = [
            np.asarray(block.get(name, np.zeros(n, bool)), bool)
            for name in (FAILED_INCUMBENT, FAILED_CHALLENGER)
        ]
        scores = [block[INCUMBENT], block[CHALLENGER]]
        recorder = Recorder(self.segments, self.bins, capacity=SEGMENT_VALUES)
        for version, score, wrong in zip(self._versions, scores, failed, strict=True):
            recorder.record(version, score, block, 0.0, wrong)
        self.counts.add(recorder.drain())
        both = ~(failed[0] | failed[1])
        before, now = scores[0][both], scores[1][both]
        flat = self.bins.index(before) * self.bins.count + self.bins.index(now)
        self.joint += np.bincount(flat, minlength=self.joint.size).reshape(self.joint.shape)
        self._change(before, now)
        if LABEL in block and self.bins.scale is not Scale.LABEL:
            for version, score, wrong in zip(self._versions, scores, failed, strict=True):
                label = np.asarray(block[LABEL], np.float64)
                known = ~wrong & np.isfinite(label)
                self.labels[version].add(LabelSketch.of(self.bins, score[known], label[known]))
        return self

    def merge(self, other: "Backtest") -> Self:
        """Count the other's blocks as well: for workers that each took a part."""
        self.counts.add(other.counts)
        for version, sketch in other.labels.items():
            self.labels[version].add(sketch)
        self.joint += other.joint
        mine, theirs = self.changes, other.changes
        largest = max(mine[2], theirs[2])
        self.changes = [a + b for a, b in zip(mine, theirs, strict=True)]
        self.changes[2] = largest
        return self

    def _change(self, before: NDArray[Any], now: NDArray[Any]) -> None:
        rows = len(before)
        if self.bins.scale is Scale.LABEL:
            changed = float(np.count_nonzero(before != now))
            self.changes = [self.changes[0] + rows, 0.0, 0.0, self.changes[3] + changed]
            return
        finite = np.isfinite(before) & np.isfinite(now)
        change = np.abs(now[finite].astype(np.float64) - before[finite])
        crossed = float(np.count_nonzero((now >= 0.5) != (before >= 0.5)))
        self.changes = [
            self.changes[0] + rows,
            self.changes[1] + float(change.sum()),
            max(self.changes[2], float(change.max(initial=0.0))),
            self.changes[3] + crossed,
        ]

    def report(self) -> BacktestReport:
        """The figures, and whether the challenger may go on. Raises InputError without rows."""
        before, now = (
            self.counts.versions.get(version, Sketch.empty(self.bins)) for version in self._versions
        )
        if not before.overall.rows:
            raise InputError("a backtest of no rows: is the data set, or the captured time, empty?")
        differences = (*self._overall(before, now), *self._by_segment(before, now))
        reasons = tuple(_reason(one) for one in differences if one.failed)
        rows, total, largest, crossed = self.changes
        return BacktestReport(
            rows=before.overall.rows,
            incumbent=self.incumbent,
            challenger=self.challenger,
            differences=differences,
            mean_change=total / max(rows, 1),
            largest_change=largest,
            crossed=crossed / max(rows, 1),
            passed=not reasons,
            reasons=reasons,
        )

    def _overall(self, before: Sketch, now: Sketch) -> Iterator[Difference]:
        limits, rows = self.thresholds, before.overall.rows
        failed = [of.proportion(s.overall.errors, s.overall.rows) for s in (before, now)]
        yield _compared("error rate", rows, failed[0], failed[1], limits.error_rate, -1)
        yield from self._divergences(
            before.overall.scores, now.overall.scores, limits.psi, limits.kl, apart=1
        )
        pair = [self.labels[version] for version in self._versions]
        if not all(labels.count for labels in pair):
            return
        rows = min(labels.count for labels in pair)
        for name, figure, threshold, sign in (
            ("AUC", of.auc, limits.auc, 1),
            ("accuracy", of.accuracy, limits.accuracy, 1),
            ("calibration error", of.calibration, limits.calibration, -1),
        ):
            yield _compared(name, rows, figure(pair[0]), figure(pair[1]), threshold, sign)

    def _by_segment(self, before: Sketch, now: Sketch) -> Iterator[Difference]:
        limits = self.thresholds
        for column in self.segments:
            for value, (a, b) in _largest(before.segments[column], now.segments[column]):
                yield from self._divergences(
                    a.outcomes,
                    b.outcomes,
                    limits.segment_psi, limits.segment_kl, 2, f"{column}={value}",
                )  # fmt: skip

    def _divergences(
        self, before: NDArray[Any], now: NDArray[Any], psi_limit: float, kl_limit: float,
        apart: int, segment: str = "",
    ) -> Iterator[Difference]:  # fmt: skip
        rows = int(min(before.sum(), now.sum()))
        if not rows:
            return
        at = grouped(before + now, apart)
        a, b = np.add.reduceat(before, at), np.add.reduceat(now, at)
        seen = a + b > 0
        for name, measure, limit in (("score PSI", psi, psi_limit), ("score KL", kl, kl_limit)):
            found = measure(a[seen], b[seen])
            low = found.low(_DEVIATIONS)
            yield Difference(name, segment, rows, None, None, found.value, low, limit)

    def curves(self) -> dict[str, tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]:
        """By version, for plots: counts of scores by bin (failed rows left out), mean score and
        rate of positive labels by bin, NaN where there are none. Each of shape (bins.count,)."""
        found = {}
        for version in self._versions:
            sketch = self.counts.versions.get(version, Sketch.empty(self.bins))
            labels = self.labels[version]
            count = (labels.positives + labels.negatives).astype(np.float64)
            count[count == 0] = np.nan
            found[version] = (
                sketch.overall.scores, labels.score_sum / count, labels.positives / count
            )  # fmt: skip
        return found

    def edges(self) -> NDArray[np.float64]:
        """Upper edges of the finite bins but the last; empty for labels."""
        return np.zeros(0) if self.bins.scale is Scale.LABEL else edges_of(self.bins)[:-1]


def _largest(
    before: dict[str, Tally], now: dict[str, Tally]
) -> Iterator[tuple[str, tuple[Tally, Tally]]]:
    """The values with most rows, and the others as one; blocks may each have seen other values."""
    order = sorted(before.keys() - {OTHER}, key=lambda value: (-before[value].rows, value))
    yield from ((value, (before[value], now[value])) for value in sorted(order[:SEGMENT_VALUES]))
    rest = [*order[SEGMENT_VALUES:], *(before.keys() & {OTHER})]
    if rest:
        totals = before[rest[0]].copy(), now[rest[0]].copy()
        for value in rest[1:]:
            totals[0].add(before[value])
            totals[1].add(now[value])
        yield OTHER, totals


def _compared(
    name: str, rows: int, before: of.Estimate, now: of.Estimate, threshold: float, sign: int
) -> Difference:
    size = sign * (before.value - now.value)
    low = size - _DEVIATIONS * float(np.hypot(before.error, now.error))
    return Difference(
        name, "", rows, _number(before.value), _number(now.value), _number(size), _number(low),
        threshold,
    )  # fmt: skip


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _reason(one: Difference) -> str:
    where = f" where {one.segment}" if one.segment else ""
    return (
        f"{one.figure}{where}: worse by {one.size:.4g} (at least {one.low:.4g}), threshold "
        f"{one.threshold:.4g}, {one.rows} rows"
    )
