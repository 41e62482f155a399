"""Simulated rollouts: traffic of flights, two versions of a model, the real guard and machine.

Time is simulated; splitting, recording, judging and stepping are the library's own.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from twinpath.graph.columns import Columns
from twinpath.rollout.guard import Guard, Labelled, Moved, Observed
from twinpath.rollout.labels import LabelSketch
from twinpath.rollout.machine import Judged, advance, start
from twinpath.rollout.recorder import Recorder
from twinpath.rollout.split import Split
from twinpath.rollout.state import RolloutState, Status
from twinpath.rollout.verdict import Verdict

CARRIERS = np.array([f"C{number:02d}" for number in range(16)], object)
#: One carrier has 5 % of the traffic, the others share the rest unevenly.
WEIGHTS = np.array([0.05, *(0.95 * np.arange(15, 0, -1) / 120)])
WRONG = "C00"

#: A version of the model: (logits of the true rate, columns, generator) → scores, shape (n,).
Version = Callable[[NDArray[np.float64], Columns, np.random.Generator], NDArray[np.float64]]


def incumbent(
    logits: NDArray[np.float64], _: Columns, random: np.random.Generator
) -> NDArray[np.float64]:
    """A model that knows the true rate but for some noise."""
    return _sigmoid(logits + random.normal(0, 0.5, len(logits)))


def better(
    logits: NDArray[np.float64], _: Columns, random: np.random.Generator
) -> NDArray[np.float64]:
    """A better one: half the noise, so its scores are spread a little differently."""
    return _sigmoid(logits + random.normal(0, 0.25, len(logits)))


def wrong_for_one(
    logits: NDArray[np.float64], columns: Columns, random: np.random.Generator
) -> NDArray[np.float64]:
    """As the incumbent, but the opposite for one carrier."""
    sign = np.where(columns["carrier"] == WRONG, -1.0, 1.0)
    return incumbent(sign * logits, columns, random)


def shifted(
    logits: NDArray[np.float64], columns: Columns, random: np.random.Generator
) -> NDArray[np.float64]:
    """All scores too high, by 1 in the logit."""
    return incumbent(logits + 1, columns, random)


@dataclass(frozen=True)
class Fault:
    """What is wrong with a challenger beside its scores."""

    error_rate: float = 0.001
    slower: float = 1.0
    labels: bool = False


@dataclass
class Run:
    """How a simulated rollout went."""

    state: RolloutState
    verdicts: list[Verdict] = field(default_factory=list)
    seconds: int = 0
    #: Rows that the challenger answered or scored.
    exposed: int = 0

    @property
    def rolled_back(self) -> bool:
        """Whether the guard rolled it back."""
        return self.state.status is Status.ROLLED_BACK


@dataclass
class Second:
    """One second of traffic: scores of both versions for all rows, and the split."""

    columns: Columns
    before: NDArray[np.float64]
    now: NDArray[np.float64]
    challenger: NDArray[np.bool_]
    outcome: NDArray[np.bool_]
    step: int


def traffic(
    state: Callable[[], RolloutState], version: Version, rows_per_s: int, seed: int
) -> Iterator[Second]:
    """Seconds of flights without end; the rate drifts through the day for all alike."""
    random = np.random.default_rng(seed)
    second = 0
    while True:
        n = int(random.poisson(rows_per_s))
        carrier = random.choice(len(CARRIERS), n, p=WEIGHTS)
        columns: Columns = {
            "carrier": CARRIERS[carrier],
            "flight": random.integers(0, 2**40, n),
        }
        drift = 0.5 * np.sin(second / 40)
        # The one carrier is late more often than not: its opposite is early.
        usual = np.where(carrier == 0, 1.5, -1.0 + 0.05 * carrier)
        logits = usual + drift + random.normal(0, 1.2, n)
        parts = Split.of(state()).parts(columns)
        yield Second(
            columns,
            incumbent(logits, columns, random),
            version(logits, columns, random),
            parts.challenger | parts.mirrored,
            random.random(n) < _sigmoid(logits),
            state().step,
        )
        second += 1


def rollout(
    version: Version,
    fault: Fault = Fault(),
    *,
    seed: int = 0,
    rows_per_s: int = 400,
    seconds: int = 3_000,
    tick_s: int = 1,
    segments: tuple[str, ...] = ("carrier",),
    watch: Callable[[Second], None] | None = None,
) -> Run:
    """A canary from its start to its end, judged each ``tick_s`` seconds."""
    asked = RolloutState(
        id=f"sim-{seed}", model="delay", incumbent="1", challenger="2", key=("flight",),
        segments=segments, minimum_samples=1000, minimum_time_s=60,
    )  # fmt: skip
    run = Run(start(asked, now_s=1.0).state)
    guard = Guard(run.state)
    recorder = Recorder(segments)
    random = np.random.default_rng(seed + 1_000_003)
    flow = traffic(lambda: run.state, version, rows_per_s, seed)
    labels = {name: LabelSketch.empty(run.state.bins) for name in ("1", "2")}
    for second in range(2, seconds):
        moment = next(flow)
        if watch:
            watch(moment)
        for name, scores, mask in (
            ("1", moment.before, ~moment.challenger),
            ("2", moment.now, moment.challenger),
        ):
            _record(recorder, name, scores, mask, moment.columns, fault, random)
            if fault.labels:
                labels[name].add(LabelSketch.of(run.state.bins, scores[mask], moment.outcome[mask]))
        run.exposed += int(moment.challenger.sum())
        if second % tick_s:
            continue
        if fault.labels:
            guard.handle(Labelled(float(second), labels))
            labels = {name: LabelSketch.empty(run.state.bins) for name in ("1", "2")}
        verdict = guard.handle(Observed(float(second), recorder.drain()))
        run.verdicts.append(verdict)
        run.state = advance(run.state, Judged(verdict)).state
        run.seconds = second - 1
        if not run.state.live:
            break
        guard.handle(Moved(float(second), run.state))
    return run


def _record(
    recorder: Recorder,
    name: str,
    scores: NDArray[np.float64],
    mask: NDArray[np.bool_],
    columns: Columns,
    fault: Fault,
    random: np.random.Generator,
) -> None:
    """Calls of up to 16 rows, with times and failures."""
    rows = np.flatnonzero(mask)
    if not len(rows):
        return
    challenger = name == "2"
    slower = fault.slower if challenger else 1.0
    error_rate = fault.error_rate if challenger else Fault.error_rate
    calls = np.array_split(rows, -(-len(rows) // 16))
    times = 0.002 * slower * random.lognormal(0, 0.4, len(calls))
    for call, time_s in zip(calls, times, strict=True):
        recorder.record(
            name, scores[call], {"carrier": columns["carrier"][call]}, float(time_s),
            random.random(len(call)) < error_rate,
        )  # fmt: skip


def _sigmoid(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(1 / (1 + np.exp(-values)), np.float64)
