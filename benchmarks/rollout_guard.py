"""Two hundred rollouts of an equal model, and faults: whom the guard stops, and how soon.

Traffic is simulated (400 flights a second, 16 carriers, a rate that drifts), the split, recorder,
guard and machine are the library's. Beside it the usual way: a Kolmogorov-Smirnov test of the
step's scores so far, looked at each second, that rolls back at p < 0.01. No server and no clock are
involved, so the figures are the same on any machine.
"""

from statistics import median

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from scipy.stats import kstwobign

from benchmarks.report import Row
from benchmarks.rollout_traffic import (
    Fault,
    Run,
    Second,
    Version,
    better,
    incumbent,
    rollout,
    shifted,
    wrong_for_one,
)
from twinpath.rollout.bins import Bins
from twinpath.rollout.state import Status

EQUAL = 200
FAULTY = 15
ALLOWED = 0.01
#: The first step's minimum time, seconds: a fault that is found sooner never passes 5 %.
FIRST_STEP_S = 60

FAULTS: dict[str, tuple[Version, Fault]] = {
    "scores 1 logit too high": (shifted, Fault()),
    "wrong for one carrier (5 %)": (wrong_for_one, Fault()),
    "3 % of rows fail": (incumbent, Fault(error_rate=0.03)),
    "10× slower": (incumbent, Fault(slower=10)),
    "2× slower": (incumbent, Fault(slower=2)),
}


class Peeking:
    """A Kolmogorov-Smirnov test of a step's binned scores, asked each second."""

    def __init__(self) -> None:
        self._bins = Bins()
        self._counts = np.zeros((2, self._bins.count))
        self._step = 0
        self.alarmed = False

    def see(self, second: Second) -> None:
        """A second of traffic."""
        if second.step != self._step:
            self._step = second.step
            self._counts[:] = 0
        for at, (scores, mask) in enumerate(
            ((second.before, ~second.challenger), (second.now, second.challenger))
        ):
            index = self._bins.index(scores[mask])
            self._counts[at] += np.bincount(index, minlength=self._bins.count)
        sizes = self._counts.sum(axis=1)
        if sizes.min() < 30:
            return
        below: NDArray[np.float64] = np.cumsum(self._counts, axis=1) / sizes[:, None]
        distance = float(np.abs(below[0] - below[1]).max())
        p_value = kstwobign.sf(distance * np.sqrt(sizes.prod() / sizes.sum()))
        self.alarmed |= bool(p_value < 0.01)


def run(rounds: int, console: Console) -> list[Row]:
    """The figures; they are the same for any number of rounds. Raises SystemExit when a good
    challenger is not promoted or the overall check finds the one carrier by itself."""
    del rounds
    equal, peeked = 0, 0
    for seed in range(EQUAL):
        with console.status(f"equal models, {seed + 1} of {EQUAL}"):
            watch = Peeking()
            equal += rollout(incumbent, Fault(labels=True), seed=seed, watch=watch.see).rolled_back
            peeked += watch.alarmed
    of = f"rollouts of {EQUAL}"
    rows = [
        Row("equal model rolled back", of, equal, ALLOWED * EQUAL, "allowed: 1 %", "<= 1"),
        Row("the same beside a test", of, equal, peeked, "Kolmogorov-Smirnov each second"),
    ]
    good = _all(better, Fault(labels=True), console, "better model")
    promoted = sum(run.state.status is Status.PROMOTED for run in good)
    rows.append(Row("better model promoted", f"of {FAULTY}", promoted, FAULTY, "all", ">= 1"))
    for name, (version, fault) in FAULTS.items():
        found = _all(version, fault, console, name)
        if not all(run.rolled_back for run in found):
            raise SystemExit(f"{name}: {sum(not run.rolled_back for run in found)} not rolled back")
        target = "<= 1" if name != "2× slower" else None
        delay_s = median(run.seconds for run in found)
        rows.append(Row(name, "s to roll back", delay_s, FIRST_STEP_S, "first step", target))
    alone = _all(wrong_for_one, Fault(), console, "without segments", segments=())
    passed = sum(run.state.status is Status.PROMOTED for run in alone)
    segment = _all(wrong_for_one, Fault(), console, "with segments")
    rows.append(
        Row(
            "wrong for one carrier, got through", f"of {FAULTY}",
            sum(not run.rolled_back for run in segment), passed, "overall check alone", "<= 0",
        )
    )  # fmt: skip
    return rows


def _all(
    version: Version,
    fault: Fault,
    console: Console,
    name: str,
    segments: tuple[str, ...] = ("carrier",),
) -> list[Run]:
    runs = []
    for seed in range(FAULTY):
        with console.status(f"{name}, {seed + 1} of {FAULTY}"):
            runs.append(rollout(version, fault, seed=1000 + seed, segments=segments))
    return runs
