"""Evidence that may be looked at at any time: e-processes for two samples.

A block of new outcomes, n of the incumbent and m of the challenger, multiplies the e-value by

    Π p(y) over the incumbent's · Π q(y) over the challenger's / Π r(y) over all,
    r = (n p + m q) / (n + m),

where p and q are guessed from *earlier* blocks alone. Under "both have one distribution" its
expectation is at most 1, whatever that distribution is and however it changes from block to block
(Turner, Ly, Grünwald, "Generic E-variables for exact sequential k-sample tests that allow for
optional stopping", 2021, theorem 1: for each outcome r is the mean of p and q, so the inequality
of means bounds the product). By Ville's inequality the e-value then ever reaches 1/α with a
probability of at most α: peeking each second costs nothing, and traffic that drifts, but for both
alike, is no evidence. For one-sided rates the same holds for "the challenger's is not higher"
when p ≤ q is guessed, and no bet is placed otherwise.

Many segments: e-BH (Wang, Ramdas, "False discovery rate control with e-values", JRSS B 2022): of K
e-values the k largest are found where the k-th is at least K/(kα). It needs no independence.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import log
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinpath.rollout.divergence import grouped

Counts = NDArray[np.int64]

#: How many rows' weight the pooled past has in each guess. Small learns fast; any value is valid.
_PRIOR_ROWS = 4.0


@dataclass(slots=True)
class SameDistribution:
    """Evidence against "both versions' outcomes have one distribution", over k outcomes.

    Neighbouring outcomes are joined to about ten groups by what was seen before.
    """

    incumbent: Counts
    challenger: Counts
    log_e: float = 0.0

    @classmethod
    def over(cls, outcomes: int) -> "SameDistribution":
        """Nothing seen yet, of so many possible outcomes."""
        return cls(np.zeros(outcomes, np.int64), np.zeros(outcomes, np.int64))

    def see(self, incumbent: Counts, challenger: Counts) -> None:
        """A block of new outcomes: counts of shape (k,) of both versions."""
        n, m = int(incumbent.sum()), int(challenger.sum())
        if n and m and self.incumbent.any() and self.challenger.any():
            at = grouped(self.incumbent + self.challenger)
            past_a = np.add.reduceat(self.incumbent, at)
            past_b = np.add.reduceat(self.challenger, at)
            pooled = past_a + past_b + 0.5
            prior = _PRIOR_ROWS * pooled / pooled.sum()
            p = (past_a + prior) / (past_a.sum() + _PRIOR_ROWS)
            q = (past_b + prior) / (past_b.sum() + _PRIOR_ROWS)
            r = (n * p + m * q) / (n + m)
            self.log_e += float(
                (np.add.reduceat(incumbent, at) * np.log(p / r)).sum()
                + (np.add.reduceat(challenger, at) * np.log(q / r)).sum()
            )
        self.incumbent = self.incumbent + incumbent
        self.challenger = self.challenger + challenger


@dataclass(slots=True)
class Rate:
    """Evidence against "the challenger's rate of events is not over the incumbent's".

    A rate is guessed from the past as (events + 1/2) / (trials + 1).
    """

    #: (events, trials) so far.
    incumbent: tuple[int, int] = (0, 0)
    challenger: tuple[int, int] = (0, 0)
    log_e: float = 0.0

    def see(self, incumbent: tuple[int, int], challenger: tuple[int, int]) -> None:
        """New (events, trials) of both versions."""
        self.log_e += bet(self.incumbent, self.challenger, incumbent, challenger)
        self.incumbent = _sum(self.incumbent, incumbent)
        self.challenger = _sum(self.challenger, challenger)


def bet(
    past_incumbent: tuple[int, int],
    past_challenger: tuple[int, int],
    incumbent: tuple[int, int],
    challenger: tuple[int, int],
) -> float:
    """The logarithm of a block's factor for one-sided rates; 0 where no bet is placed.

    All are (events, trials); the past may be counted by another measure of an event than blocks
    before were, so long as the measure was chosen before this block.
    """
    p, q = guess(past_incumbent), guess(past_challenger)
    n, m = incumbent[1], challenger[1]
    if not n or not m or q <= p:
        return 0.0
    r = (n * p + m * q) / (n + m)
    return sum(
        events * log(rate / r) + (trials - events) * log((1 - rate) / (1 - r))
        for rate, (events, trials) in ((p, incumbent), (q, challenger))
    )


def guess(past: tuple[int, int]) -> float:
    """A rate from (events, trials), strictly between 0 and 1."""
    return (past[0] + 0.5) / (past[1] + 1)


@dataclass(slots=True)
class KnownRate:
    """Evidence against "the rate of events is at most ``limit``", of one version alone.

    A likelihood ratio with the alternative guessed from the past (Robbins, Siegmund 1974): for
    when the incumbent answers nothing any more.
    """

    limit: float
    past: tuple[int, int] = field(default=(0, 0))
    log_e: float = 0.0

    def see(self, new: tuple[int, int]) -> None:
        """New (events, trials). ``limit`` may be changed between calls, on what was seen before."""
        q, p = guess(self.past), self.limit
        if q > p:
            events, trials = new
            self.log_e += events * log(q / p) + (trials - events) * log((1 - q) / (1 - p))
        self.past = _sum(self.past, new)


def _sum(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    return a[0] + b[0], a[1] + b[1]


def found_by_ebh(log_e: Sequence[float], hypotheses: int, alpha: float) -> list[int]:
    """Positions of the e-values that e-BH finds among ``hypotheses`` tests at level ``alpha``;
    those not given are as good as 1, so the number of tests may be fixed before any is known."""
    order = sorted(range(len(log_e)), key=lambda i: -log_e[i])
    found = 0
    for rank, i in enumerate(order, 1):
        if log_e[i] >= log(hypotheses / (rank * alpha)):
            found = rank
    return sorted(order[:found])


def needed(alpha: float, tests: int = 1) -> float:
    """The logarithm of an e-value that finds one of so many tests at level ``alpha``."""
    return log(tests / alpha)


def rate_difference(incumbent: tuple[int, int], challenger: tuple[int, int]) -> tuple[float, float]:
    """Challenger's rate less the incumbent's, and its standard error (Agresti, Caffo 2000)."""
    variance = 0.0
    for events, trials in (incumbent, challenger):
        smooth = (events + 1) / (trials + 2)
        variance += smooth * (1 - smooth) / (trials + 2)
    raw: Any = challenger[0] / max(challenger[1], 1) - incumbent[0] / max(incumbent[1], 1)
    return float(raw), variance**0.5
