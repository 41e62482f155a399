"""Delayed labels of each version, and what they say: AUC, accuracy, calibration, mean label.

Labels are binary: 1 for what the score predicts, 0 else. They are counted beside the bin of the
score that they belong to, so sketches of replicas add up as those of scores do.
"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from twinpath.errors import InputError
from twinpath.rollout.bins import Bins

Counts = NDArray[np.int64]


@dataclass(slots=True)
class LabelSketch:
    """Labels of one version by the bin of their score.

    ``positives`` and ``negatives`` have shape (bins.count,), ``score_sum`` too: the sum of the
    scores in the bin. ``agreed``: labels that the score was on the right side of ``cut`` for.
    """

    positives: Counts
    negatives: Counts
    score_sum: NDArray[np.floating[Any]]
    agreed: int = 0

    @classmethod
    def empty(cls, bins: Bins) -> Self:
        """No labels yet."""
        zeros = np.zeros(bins.count, np.int64)
        return cls(zeros, zeros.copy(), zeros.astype(np.float64))

    @classmethod
    def of(cls, bins: Bins, scores: ArrayLike, labels: ArrayLike, cut: float = 0.5) -> Self:
        """From n scores and their n labels. Raises InputError for labels beside 0 and 1."""
        score = np.asarray(scores, np.float64)
        label = np.asarray(labels, np.float64)
        if score.shape != label.shape or score.ndim != 1:
            raise InputError(f"{score.shape} scores and {label.shape} labels: expected n of each")
        wrong = label[(label != 0) & (label != 1)]
        if len(wrong):
            raise InputError(f"label {wrong[0]:g}: expected 0 or 1 (true or false)")
        index = bins.index(score)
        positive = label == 1
        finite = np.nan_to_num(score, posinf=0, neginf=0)
        return cls(
            np.bincount(index[positive], minlength=bins.count).astype(np.int64),
            np.bincount(index[~positive], minlength=bins.count).astype(np.int64),
            np.bincount(index, finite, bins.count).astype(np.float64),
            int(np.count_nonzero((score >= cut) == positive)),
        )

    @property
    def count(self) -> int:
        """Number of labels."""
        return int(self.positives.sum() + self.negatives.sum())

    @property
    def outcomes(self) -> Counts:
        """Shape (2 * bins.count,): each score bin's negatives and positives, side by side."""
        return np.stack([self.negatives, self.positives], axis=1).ravel()

    def add(self, other: "LabelSketch") -> None:
        """Count the other's labels as well."""
        self.positives = self.positives + other.positives
        self.negatives = self.negatives + other.negatives
        self.score_sum = self.score_sum + other.score_sum
        self.agreed += other.agreed


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its standard error; NaN and infinity where there are no labels for it."""

    value: float
    error: float


_NONE = Estimate(float("nan"), float("inf"))


def auc(labels: LabelSketch) -> Estimate:
    """Area under the ROC curve; scores of one bin count as ties. Its standard error is that of
    Hanley and McNeil (Radiology, 1982)."""
    positives, negatives = int(labels.positives.sum()), int(labels.negatives.sum())
    if not positives or not negatives:
        return _NONE
    below = np.cumsum(labels.negatives) - labels.negatives
    wins = float((labels.positives * (below + labels.negatives / 2)).sum())
    area = wins / (positives * negatives)
    first, second = area / (2 - area), 2 * area**2 / (1 + area)
    variance = (
        area * (1 - area)
        + (positives - 1) * (first - area**2)
        + (negatives - 1) * (second - area**2)
    ) / (positives * negatives)
    return Estimate(area, max(variance, 0.0) ** 0.5)


def proportion(successes: int, count: int) -> Estimate:
    """A rate, with the standard error of one more success and failure (Agresti, Coull 1998), so
    that it is not 0 where all agreed."""
    if not count:
        return _NONE
    smooth = (successes + 1) / (count + 2)
    return Estimate(successes / count, (smooth * (1 - smooth) / (count + 2)) ** 0.5)


def accuracy(labels: LabelSketch) -> Estimate:
    """Part of the labels that the score was on the right side for."""
    return proportion(labels.agreed, labels.count)


def mean_label(labels: LabelSketch) -> Estimate:
    """Part of the labels that are 1: the KPI, where a label is a success."""
    return proportion(int(labels.positives.sum()), labels.count)


def calibration(labels: LabelSketch) -> Estimate:
    """Root mean squared calibration error over the bins, less its small-sample bias
    (Kumar, Liang, Ma, NeurIPS 2019, section 5)."""
    per_bin = labels.positives + labels.negatives
    used = per_bin > 1
    if not used.any():
        return _NONE
    n = per_bin[used].astype(np.float64)
    rate = labels.positives[used] / n
    gap = labels.score_sum[used] / n - rate
    squared = float((n * (gap**2 - rate * (1 - rate) / (n - 1))).sum() / n.sum())
    # A mean of n values between 0 and 1 has at most this standard error.
    return Estimate(max(squared, 0.0) ** 0.5, 0.5 / n.sum() ** 0.5)
