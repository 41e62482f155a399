"""The guard's checks: each keeps its evidence and yields findings. Pure.

A check's evidence begins anew with each step of a rollout: what went well before does not hide
what goes wrong now.
"""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from twinpath.rollout import labels as of
from twinpath.rollout.bins import LATENCY_BINS, LATENCY_PER_DECADE, Bins
from twinpath.rollout.divergence import grouped, kl, psi
from twinpath.rollout.labels import LabelSketch
from twinpath.rollout.sequential import (
    KnownRate,
    Rate,
    SameDistribution,
    Trials,
    added,
    bet,
    found_by_ebh,
    needed,
    rate_difference,
)
from twinpath.rollout.sketch import OTHER, Sketch, Tally
from twinpath.rollout.state import Thresholds
from twinpath.rollout.verdict import Finding

Counts = NDArray[np.int64]

#: Values of each segment column that are judged apart; further ones count as ``(other)``.
SEGMENT_VALUES = 64
#: Lower bounds are so many standard errors below the estimate.
_DEVIATIONS = 2.0
#: Calls of each version before their 99th percentiles are compared.
_CALLS = 100
#: Rows of the incumbent that make its rate of errors known, and a rate that is too high for all.
_KNOWN_ROWS = 200
_MOST_FAIL = 0.5
#: Rows of each version in a segment, or labels, before a difference makes the guard wait.
FEW = 30


class Errors:
    """Rows that fail: the challenger's rate against the incumbent's.

    ``alone``: while the incumbent answers nothing (the last step), against its rate in earlier
    steps and the margin; against half of all rows where that rate is not known.
    """

    def __init__(
        self, limits: Thresholds, alpha: float, known: Trials = (0, 0), *, alone: bool = False
    ) -> None:
        self._limits, self._needed = limits, needed(alpha, 2)
        self._rate = Rate()
        self._known = known
        self._is_alone = alone
        self._alone = KnownRate(_MOST_FAIL)

    def see(self, incumbent: Tally, challenger: Tally) -> None:
        """New rows of both versions."""
        before, now = _failed(incumbent), _failed(challenger)
        self._rate.see(before, now)
        if self._is_alone:
            if self._known[1] >= _KNOWN_ROWS:
                known = of.proportion(*self._known)
                highest = known.value + 3 * known.error
                self._alone.limit = min(highest + self._limits.error_rate, _MOST_FAIL)
            self._alone.see(now)
        self._known = added(self._known, before)

    @property
    def known(self) -> Trials:
        """The incumbent's (failed, all) rows of all steps."""
        return self._known

    def findings(self) -> Iterator[Finding]:
        """The two comparisons, where there is something to compare."""
        margin = self._limits.error_rate
        if self._rate.incumbent[1] and self._rate.challenger[1]:
            size, error = rate_difference(self._rate.incumbent, self._rate.challenger)
            yield Finding(
                "error rate", size, size - _DEVIATIONS * error, margin, self._rate.log_e,
                self._needed, self._rate.incumbent[1], self._rate.challenger[1],
            )  # fmt: skip
        if self._alone.past[1]:
            size, error = rate_difference(self._known, self._alone.past)
            yield Finding(
                "error rate, against earlier", size, size - _DEVIATIONS * error, margin,
                self._alone.log_e, self._needed, self._known[1], self._alone.past[1],
            )  # fmt: skip


class Latency:
    """The 99th percentile of a call's time, by counting what exceeds the incumbent's.

    With x the incumbent's 99th percentile so far and c the ratio allowed: evidence that calls of
    the challenger take longer than c·x more often than the incumbent's take longer than x.
    """

    def __init__(self, limits: Thresholds, alpha: float) -> None:
        self._needed = needed(alpha)
        self._ratio = limits.latency_ratio
        self._shift = int(np.ceil(np.log10(self._ratio) * LATENCY_PER_DECADE))
        self._incumbent = np.zeros(LATENCY_BINS, np.int64)
        self._challenger = np.zeros(LATENCY_BINS, np.int64)
        self._log_e = 0.0

    def see(self, incumbent: Counts, challenger: Counts) -> None:
        """New calls of both versions, by time."""
        if self._incumbent.sum() >= _CALLS:
            at = _percentile(self._incumbent) + 1
            slow = at + self._shift
            self._log_e += bet(
                _over(self._incumbent, at), _over(self._challenger, slow),
                _over(incumbent, at), _over(challenger, slow),
            )  # fmt: skip
        self._incumbent = self._incumbent + incumbent
        self._challenger = self._challenger + challenger

    def findings(self) -> Iterator[Finding]:
        """One, once both have enough calls."""
        before, now = int(self._incumbent.sum()), int(self._challenger.sum())
        if before >= _CALLS and now >= _CALLS:
            ratio = _ratio(_percentile(self._challenger), _percentile(self._incumbent))
            low = _ratio(
                _percentile(self._challenger, -_DEVIATIONS),
                _percentile(self._incumbent, _DEVIATIONS),
            )
            yield Finding(
                "p99 ratio", ratio, low, self._ratio, self._log_e, self._needed, before, now,
                equal=1.0,
            )  # fmt: skip


class Scores:
    """The distribution of scores, overall and within each segment value.

    Within a segment rows that fail are an outcome as well. Findings name what e-BH finds.
    """

    def __init__(
        self, limits: Thresholds, bins: Bins, columns: tuple[str, ...], alpha: float
    ) -> None:
        self._limits, self._bins, self._alpha = limits, bins, alpha
        self._overall = SameDistribution.over(bins.count, apart=1)
        self._segments: dict[str, dict[str, SameDistribution]] = {name: {} for name in columns}
        #: Fixed before any value is seen, so that the correction does not depend on the data.
        self._tests = max(len(columns), 1) * (SEGMENT_VALUES + 1)

    def see(self, incumbent: Sketch, challenger: Sketch) -> None:
        """New rows of both versions."""
        self._overall.see(incumbent.overall.scores, challenger.overall.scores)
        for column, known in self._segments.items():
            before = self._bounded(known, incumbent.segments.get(column, {}))
            now = self._bounded(known, challenger.segments.get(column, {}))
            nothing = np.zeros(self._bins.count + 1, np.int64)
            for value in before.keys() | now.keys():
                known[value].see(before.get(value, nothing), now.get(value, nothing))

    def _bounded(
        self, known: dict[str, SameDistribution], values: dict[str, Tally]
    ) -> dict[str, Counts]:
        counts: dict[str, Counts] = {}
        for value in sorted(values):
            room = value in known or value == OTHER or len(known.keys() - {OTHER}) < SEGMENT_VALUES
            kept = value if room else OTHER
            if kept not in known:
                known[kept] = SameDistribution.over(self._bins.count + 1, apart=2)
            outcomes = values[value].outcomes
            counts[kept] = counts[kept] + outcomes if kept in counts else outcomes
        return counts

    def overall(self) -> Iterator[Finding]:
        """PSI and KL of all scores."""
        # Two measures of one e-value: no correction between them.
        limits = (self._limits.psi, self._limits.kl)
        yield from _divergences(self._overall, limits, needed(self._alpha))

    def segments(self) -> Iterator[Finding]:
        """PSI and KL for each segment value that has rows of both versions."""
        limits = (self._limits.segment_psi, self._limits.segment_kl)
        tests = [
            (f"{column}={value}", evidence)
            for column, values in self._segments.items()
            for value, evidence in values.items()
        ]
        found = found_by_ebh([test.log_e for _, test in tests], self._tests, self._alpha)
        for i, (name, evidence) in enumerate(tests):
            # What e-BH finds needs what the weakest of those that it finds has.
            threshold = needed(self._alpha, self._tests)
            if i in found:
                threshold = min(threshold, evidence.log_e)
            yield from _divergences(evidence, limits, threshold, name)


class Labels:
    """Delayed labels: AUC, accuracy, calibration and, if asked for, the mean label."""

    def __init__(self, limits: Thresholds, bins: Bins, alpha: float) -> None:
        self._limits, self._bins = limits, bins
        self._needed = needed(alpha, 4 if limits.kpi else 3)
        self._incumbent, self._challenger = LabelSketch.empty(bins), LabelSketch.empty(bins)
        self._joint = SameDistribution.over(2 * bins.count)
        self._wrong, self._unsuccessful = Rate(), Rate()

    def see(self, incumbent: LabelSketch, challenger: LabelSketch) -> None:
        """New labels of both versions."""
        self._joint.see(incumbent.outcomes, challenger.outcomes)
        self._wrong.see(_disagreed(incumbent), _disagreed(challenger))
        self._unsuccessful.see(_negative(incumbent), _negative(challenger))
        self._incumbent.add(incumbent)
        self._challenger.add(challenger)

    def findings(self) -> Iterator[Finding]:
        """One for each figure, once both versions have a few labels."""
        if min(self._incumbent.count, self._challenger.count) < FEW:
            return
        limits = self._limits
        yield self._fall("AUC fall", of.auc, limits.auc, self._joint.log_e)
        yield self._fall("accuracy fall", of.accuracy, limits.accuracy, self._wrong.log_e)
        yield self._fall(
            "calibration error rise", of.calibration, limits.calibration, self._joint.log_e, -1
        )
        if limits.kpi:
            yield self._fall("KPI fall", of.mean_label, limits.kpi, self._unsuccessful.log_e)

    def _fall(
        self,
        name: str,
        figure: Callable[[LabelSketch], of.Estimate],
        threshold: float,
        log_e: float,
        sign: int = 1,
    ) -> Finding:
        before, now = figure(self._incumbent), figure(self._challenger)
        size = sign * (before.value - now.value)
        low = size - _DEVIATIONS * float(np.hypot(before.error, now.error))
        return Finding(
            name, size, low, threshold, log_e, self._needed,
            self._incumbent.count, self._challenger.count,
        )  # fmt: skip


def _divergences(
    evidence: SameDistribution, limits: tuple[float, float], needed_: float, segment: str = ""
) -> Iterator[Finding]:
    before, now = evidence.incumbent, evidence.challenger
    n, m = int(before.sum()), int(now.sum())
    if not n or not m:
        return
    at = grouped(before + now, evidence.apart)
    a, b = np.add.reduceat(before, at), np.add.reduceat(now, at)
    seen = a + b > 0
    a, b = a[seen], b[seen]
    for name, found, limit in (
        ("score PSI", psi(a, b), limits[0]),
        ("score KL", kl(a, b), limits[1]),
    ):
        yield Finding(
            name, found.value, found.low(_DEVIATIONS), limit, evidence.log_e, needed_, n, m, segment
        )


def _failed(tally: Tally) -> Trials:
    return tally.errors, tally.rows


def _disagreed(labels: LabelSketch) -> Trials:
    return labels.count - labels.agreed, labels.count


def _negative(labels: LabelSketch) -> Trials:
    return int(labels.negatives.sum()), labels.count


def _percentile(calls: Counts, deviations: float = 0.0) -> int:
    """The bin that holds the 99th percentile, or one so many standard errors of its rank off."""
    n = int(calls.sum())
    rank = 0.99 + deviations * (0.99 * 0.01 / n) ** 0.5
    return int(np.searchsorted(np.cumsum(calls), min(rank, 1.0) * n))


def _ratio(challenger_bin: int, incumbent_bin: int) -> float:
    return float(10 ** ((challenger_bin - incumbent_bin) / LATENCY_PER_DECADE))


def _over(calls: Counts, at: int) -> Trials:
    """(calls in this bin and above, all calls)."""
    return int(calls[at:].sum()), int(calls.sum())
