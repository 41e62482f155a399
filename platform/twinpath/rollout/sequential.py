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
from math import log, sqrt

import numpy as np
from numpy.typing import NDArray

from twinpath.rollout.divergence import grouped

Counts = NDArray[np.int64]
#: (events, trials).
Trials = tuple[int, int]

#: How many rows' weight the pooled past has in each guess. Small learns fast; any value is valid.
_PRIOR_ROWS = 4.0


@dataclass(slots=True)
class SameDistribution:
    """Evidence against "both versions' outcomes have one distribution", over k outcomes.

    Neighbouring outcomes are joined to about ten groups by what was seen before.
    """

    #: Counts of all closed blocks, and of the open one: shape (2, k), incumbent first.
    past: Counts
    open: Counts
    #: So many outcomes at the end are never joined with others.
    apart: int = 0
    log_e: float = 0.0

    @classmethod
    def over(cls, outcomes: int, apart: int = 0) -> "SameDistribution":
        """Nothing seen yet, of so many possible outcomes."""
        return cls(np.zeros((2, outcomes), np.int64), np.zeros((2, outcomes), np.int64), apart)

    @property
    def incumbent(self) -> Counts:
        """All that was seen of the incumbent: shape (k,)."""
        return np.asarray(self.past[0] + self.open[0])

    @property
    def challenger(self) -> Counts:
        """All that was seen of the challenger: shape (k,)."""
        return np.asarray(self.past[1] + self.open[1])

    def see(self, incumbent: Counts, challenger: Counts) -> None:
        """New outcomes: counts of shape (k,) of both versions. A block is closed once it has
        some of both."""
        self.open = self.open + np.stack([incumbent, challenger])
        n, m = self.open.sum(axis=1).tolist()
        if not n or not m:
            return
        if self.past.any():
            at = grouped(self.past.sum(axis=0), self.apart)
            past_a, past_b = np.add.reduceat(self.past, at, axis=1)
            new_a, new_b = np.add.reduceat(self.open, at, axis=1)
            pooled = past_a + past_b + 0.5
            prior = _PRIOR_ROWS * pooled / pooled.sum()
            p = (past_a + prior) / (past_a.sum() + _PRIOR_ROWS)
            q = (past_b + prior) / (past_b.sum() + _PRIOR_ROWS)
            r = (n * p + m * q) / (n + m)
            self.log_e += float((new_a * np.log(p / r)).sum() + (new_b * np.log(q / r)).sum())
        self.past, self.open = self.past + self.open, np.zeros_like(self.open)


@dataclass(slots=True)
class Rate:
    """Evidence against "the challenger's rate of events is not over the incumbent's".

    A rate is guessed from the past as (events + 1/2) / (trials + 1).
    """

    #: (events, trials) of the incumbent and the challenger, in closed blocks and in the open one.
    past: tuple[Trials, Trials] = ((0, 0), (0, 0))
    open: tuple[Trials, Trials] = ((0, 0), (0, 0))
    log_e: float = 0.0

    @property
    def incumbent(self) -> Trials:
        """All (events, trials) of the incumbent."""
        return added(self.past[0], self.open[0])

    @property
    def challenger(self) -> Trials:
        """All (events, trials) of the challenger."""
        return added(self.past[1], self.open[1])

    def see(self, incumbent: Trials, challenger: Trials) -> None:
        """New (events, trials) of both. A block is closed once it has some of both."""
        self.open = added(self.open[0], incumbent), added(self.open[1], challenger)
        if self.open[0][1] and self.open[1][1]:
            self.log_e += bet(*self.past, *self.open)
            self.past = added(self.past[0], self.open[0]), added(self.past[1], self.open[1])
            self.open = (0, 0), (0, 0)


def bet(
    past_incumbent: Trials,
    past_challenger: Trials,
    incumbent: Trials,
    challenger: Trials,
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


def guess(past: Trials) -> float:
    """A rate from (events, trials), strictly between 0 and 1."""
    return (past[0] + 0.5) / (past[1] + 1)


@dataclass(slots=True)
class KnownRate:
    """Evidence against "the rate of events is at most ``limit``", of one version alone.

    A likelihood ratio with the alternative guessed from the past (Robbins, Siegmund 1974): for
    when the incumbent answers nothing any more.
    """

    limit: float
    past: Trials = field(default=(0, 0))
    log_e: float = 0.0

    def see(self, new: Trials) -> None:
        """New (events, trials). ``limit`` may be changed between calls, on what was seen before."""
        q, p = guess(self.past), self.limit
        if q > p:
            events, trials = new
            self.log_e += events * log(q / p) + (trials - events) * log((1 - q) / (1 - p))
        self.past = added(self.past, new)


def added(a: Trials, b: Trials) -> Trials:
    """The sum of two (events, trials)."""
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


def rate_difference(incumbent: Trials, challenger: Trials) -> tuple[float, float]:
    """Challenger's rate less the incumbent's, and its standard error (Agresti, Caffo 2000)."""
    variance = 0.0
    for events, trials in (incumbent, challenger):
        smooth = (events + 1) / (trials + 2)
        variance += smooth * (1 - smooth) / (trials + 2)
    size = challenger[0] / max(challenger[1], 1) - incumbent[0] / max(incumbent[1], 1)
    return size, sqrt(variance)
