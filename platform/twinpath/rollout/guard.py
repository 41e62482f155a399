"""The guard: reports, labels and clock ticks in, verdicts out. Pure; the same events give the
same verdicts.

It rolls back what is certain **and** large enough to matter, whenever that is; it promotes a step
when its time and samples are there and nothing looks suspicious; else it holds. ``alpha`` of the
thresholds is shared out: between the steps, and in each between errors, latency, scores, segments
and labels. So whatever is watched, and however often, a rollout of an equal model is rolled back
with a probability of at most ``alpha``.
"""

from dataclasses import dataclass

from twinpath.rollout.checks import FEW, Errors, Labels, Latency, Scores
from twinpath.rollout.labels import LabelSketch
from twinpath.rollout.sketch import Report, Sketch
from twinpath.rollout.state import Kind, RolloutState, Status
from twinpath.rollout.verdict import Action, Finding, Verdict

_FAMILIES = 5
#: Findings that a verdict carries.
_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Observed:
    """What the replicas counted since the last report, merged: about one a second."""

    now_s: float
    report: Report


@dataclass(frozen=True, slots=True)
class Labelled:
    """Labels that came, by version of the model that gave the score."""

    now_s: float
    labels: dict[str, LabelSketch]


@dataclass(frozen=True, slots=True)
class Tick:
    """Time went on."""

    now_s: float


@dataclass(frozen=True, slots=True)
class Moved:
    """The rollout's state changed: a step, a pause, an operator's command."""

    now_s: float
    state: RolloutState


Event = Observed | Labelled | Tick | Moved


class Guard:
    """Watches one rollout from its state on. A new one starts its step's evidence afresh."""

    def __init__(self, state: RolloutState) -> None:
        self._state = state
        self._begin((0, 0))

    def _begin(self, known_errors: tuple[int, int]) -> None:
        state = self._state
        steps = len(state.steps) + (state.shadow_first > 0)
        alpha = state.thresholds.alpha / steps / _FAMILIES
        self._errors = Errors(state.thresholds, alpha, known_errors, alone=state.share >= 1)
        self._latency = Latency(state.thresholds, alpha)
        self._scores = Scores(state.thresholds, state.bins, state.segments, alpha)
        self._labels = Labels(state.thresholds, state.bins, alpha)
        self._samples = 0

    def handle(self, event: Event) -> Verdict:
        """The verdict after this event.

        Raises InputError for a report whose bins are not the state's.
        """
        if isinstance(event, Moved):
            another = (event.state.id, event.state.step) != (self._state.id, self._state.step)
            self._state = event.state
            if another:
                self._begin(self._errors.known)
        elif isinstance(event, Observed):
            self._observe(event.report)
        elif isinstance(event, Labelled):
            self._label(event.labels)
        return self._judge(event.now_s)

    @property
    def samples(self) -> int:
        """Rows that the challenger scored in this step."""
        return self._samples

    def findings(self) -> list[Finding]:
        """Every comparison of this step, worst first."""
        all_ = [
            *self._errors.findings(),
            *self._latency.findings(),
            *self._scores.overall(),
            *self._scores.segments(),
            *self._labels.findings(),
        ]
        return sorted(all_, key=_badness)

    def _observe(self, report: Report) -> None:
        empty = Report(self._state.bins)
        empty.add(report)  # refuses other bins
        none = Sketch.empty(self._state.bins)
        incumbent = empty.versions.get(self._state.incumbent, none)
        challenger = empty.versions.get(self._state.challenger, none)
        self._errors.see(incumbent.overall, challenger.overall)
        # Mirrored calls go behind all others, and a call with more rows takes longer: times are
        # compared only where that speaks for the challenger, if for anybody.
        if not self._state.mirror and self._state.share <= 0.5:
            self._latency.see(incumbent.latency, challenger.latency)
        self._scores.see(incumbent, challenger)
        self._samples += challenger.overall.rows

    def _label(self, labels: dict[str, LabelSketch]) -> None:
        none = LabelSketch.empty(self._state.bins)
        self._labels.see(
            labels.get(self._state.incumbent, none), labels.get(self._state.challenger, none)
        )

    def _judge(self, now_s: float) -> Verdict:
        state = self._state
        findings = self.findings()
        harmful = [finding for finding in findings if finding.harmful]
        if not state.live or state.ending:
            return self._verdict(Action.HOLD, "the rollout is over", now_s, findings)
        if harmful:
            return self._verdict(Action.ROLL_BACK, str(harmful[0]), now_s, findings)
        if state.status is Status.PAUSED:
            return self._verdict(Action.HOLD, "paused", now_s, findings)
        missing = self._missing(now_s)
        if missing:
            return self._verdict(Action.HOLD, f"waiting for {missing}", now_s, findings)
        doubtful = [f for f in findings if f.suspicious and f.challenger_count >= FEW]
        if doubtful:
            reason = f"waiting for more evidence: {doubtful[0]}"
            return self._verdict(Action.HOLD, reason, now_s, findings)
        if state.kind is not Kind.CANARY:
            reason = f"nothing against it in {self._samples} rows: an operator decides"
            return self._verdict(Action.HOLD, reason, now_s, findings)
        reason = f"nothing against it in {self._samples} rows"
        return self._verdict(Action.PROMOTE, reason, now_s, findings)

    def _missing(self, now_s: float) -> str:
        state = self._state
        if self._samples < state.minimum_samples:
            return f"samples: {self._samples} of {state.minimum_samples}"
        lasted_s = now_s - state.step_started_s
        if lasted_s < state.minimum_time_s:
            return f"time: {lasted_s:.0f} of {state.minimum_time_s:.0f} s"
        return ""

    def _verdict(
        self, action: Action, reason: str, now_s: float, findings: list[Finding]
    ) -> Verdict:
        return Verdict(
            action, reason, self._state.id, self._state.step, now_s, tuple(findings[:_SHOWN])
        )


def _badness(finding: Finding) -> tuple[bool, float, str, str]:
    return (
        not finding.harmful,
        -(finding.log_e - finding.needed),
        finding.check,
        finding.segment,
    )
