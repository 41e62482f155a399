"""How far apart two histograms are: KL divergence and PSI, corrected for small samples.

PSI = Σ (q - p) ln(q / p), the symmetric divergence of Jeffreys (1946), known in credit scoring as
the population stability index. Between two samples of one distribution it is about
(k - 1)(1/n + 1/m) instead of 0 (Yurdakul, "Statistical properties of the population stability
index", 2018), and half of that for KL: this bias is taken off. Standard errors are by the delta
method.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

#: Groups that bins are joined to: ten is the convention for PSI.
GROUPS = 10
#: Added to each group's count (Jeffreys' prior), so that an empty group is no infinity.
_SMOOTHING = 0.5


@dataclass(frozen=True, slots=True)
class Divergence:
    """A divergence without its small-sample bias (at least 0), and its standard error."""

    value: float
    error: float

    def low(self, deviations: float = 2.0) -> float:
        """A lower bound, so many standard errors below."""
        return self.value - deviations * self.error


def grouped(pooled: NDArray[Any], apart: int = 0, groups: int = GROUPS) -> NDArray[np.int64]:
    """Where groups of neighbouring bins begin, for ``np.add.reduceat``: about equal counts in
    each of ``groups``. ``pooled`` has shape (k,); the result is ascending from 0. The last
    ``apart`` bins are groups of their own: what is not finite, what failed."""
    if apart:
        size = len(pooled) - apart
        return np.append(grouped(pooled[:size], 0, groups), np.arange(size, len(pooled)))
    total = pooled.sum()
    if total <= 0:
        return np.zeros(1, np.int64)
    middle = (np.cumsum(pooled) - pooled / 2) / total
    label = np.minimum((middle * groups).astype(np.int64), groups - 1)
    return np.concatenate([[0], np.flatnonzero(label[1:] != label[:-1]) + 1])


def psi(incumbent: NDArray[Any], challenger: NDArray[Any]) -> Divergence:
    """Population stability index of two histograms of the same k groups; both have rows."""
    p, q, n, m = _rates(incumbent, challenger)
    log = np.log(q / p)
    free = len(p) - 1
    noise = free * (1 / n + 1 / m)
    raw = float(((q - p) * log).sum())
    variance = _spread(q, log + 1 - p / q) / m + _spread(p, -log + 1 - q / p) / n
    null = 2 * free * (1 / n + 1 / m) ** 2
    return Divergence(max(raw - noise, 0.0), float(variance + null) ** 0.5)


def kl(incumbent: NDArray[Any], challenger: NDArray[Any]) -> Divergence:
    """KL divergence, in nats, of the challenger's histogram from the incumbent's."""
    p, q, n, m = _rates(incumbent, challenger)
    log = np.log(q / p)
    free = len(p) - 1
    noise = free * (1 / n + 1 / m) / 2
    raw = float((q * log).sum())
    variance = _spread(q, log + 1) / m + _spread(p, -q / p) / n
    null = free * (1 / n + 1 / m) ** 2 / 2
    return Divergence(max(raw - noise, 0.0), float(variance + null) ** 0.5)


def _rates(
    incumbent: NDArray[Any], challenger: NDArray[Any]
) -> tuple[Floats, Floats, float, float]:
    a, b = incumbent + _SMOOTHING, challenger + _SMOOTHING
    n, m = float(a.sum()), float(b.sum())
    return a / n, b / m, n, m


def _spread(rates: Floats, values: Floats) -> float:
    """Variance of ``values`` under ``rates``."""
    mean = float((rates * values).sum())
    return max(float((rates * values**2).sum()) - mean**2, 0.0)
