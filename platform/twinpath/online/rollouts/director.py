"""Directs the rollout of one model: reports in, the registry changed. Knows nothing of Ray.

All that has to survive is in the registry, which is read at every tick; a director that starts
afresh goes on at the step that it finds there, and gathers that step's evidence anew.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from twinpath.errors import InputError, TwinpathError
from twinpath.online.rollouts.desk import Changed, Desk, shown
from twinpath.registry.reference import ModelState
from twinpath.rollout.guard import Guard, Labelled, Moved, Observed, Tick
from twinpath.rollout.labels import LabelSketch
from twinpath.rollout.machine import Command, Event, Judged, Operator, Recovered
from twinpath.rollout.sketch import Report
from twinpath.rollout.state import REFUSED_TAG, RolloutState
from twinpath.rollout.verdict import Finding, Verdict

_LOG = logging.getLogger(__name__)
#: Labels that wait for the registry to be there again.
_WAITING_LABELS = 100_000


class Director:
    """One model's. Reports and labels may come while another thread is at a tick."""

    def __init__(self, desk: Desk, model: str, clock: Callable[[], float] = time.time) -> None:
        self.desk, self.model, self._clock = desk, model, clock
        self._guard: Guard | None = None
        #: The state that the guard knows of.
        self._watched: RolloutState | None = None
        self._state: RolloutState | None = None
        self._verdict: Verdict | None = None
        #: Held for `_report` and `_labels`, which wait for the next tick.
        self._lock = threading.Lock()
        self._report: Report | None = None
        self._labels: list[tuple[str, float, float]] = []
        self._problem = ""
        self._problem_since_s = 0.0
        self._read_s = 0.0

    @property
    def state(self) -> RolloutState | None:
        """The rollout as it was read last."""
        return self._state

    @property
    def problem(self) -> str:
        """Why the last tick did nothing; empty if it did."""
        return self._problem

    @property
    def samples(self) -> int:
        """Rows that the challenger scored in this step, as far as this director knows."""
        return self._guard.samples if self._guard is not None else 0

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The guard's comparisons at the last tick, worst first."""
        return self._verdict.findings if self._verdict is not None else ()

    def report(self, report: Report) -> None:
        """Counts of a replica since its last report. They wait for the next tick; a report with
        bins of another rollout is left out."""
        with self._lock:
            if self._report is None:
                self._report = report
                return
            try:
                self._report.add(report)
            except InputError:
                # Replicas take a new rollout's bins a second apart: the newer ones count.
                self._report = report

    def label(self, versions: list[str], scores: list[float], labels: list[float]) -> None:
        """Labels of rows that were scored. They wait for the next tick."""
        with self._lock:
            room = _WAITING_LABELS - len(self._labels)
            self._labels += list(zip(versions, scores, labels, strict=True))[:room]

    def tick(self) -> RolloutState | None:
        """Look at the registry, let the guard judge, and carry out what follows. Blocks.

        A registry that is away changes nothing: the rollout stays as it is, and evidence waits.
        """
        now_s = self._clock()
        try:
            found, state = self.desk.read(self.model)
            self._read_s = now_s
            self._follow(found, state, now_s)
        except Changed as error:
            _LOG.info("%s", error)
        except TwinpathError as error:
            if not self._problem:
                self._problem_since_s = now_s
                _LOG.warning("rollout of %s stands still: %s", self.model, error)
            self._problem = error.message
        else:
            if self._problem:
                _LOG.info("rollout of %s goes on", self.model)
            self._problem = ""
        return self._state

    def status(self) -> dict[str, Any]:
        """What is known here, in JSON types: without asking the registry."""
        verdict = self._verdict
        return {
            "model": self.model,
            "rollout": shown(self._state),
            "samples": self.samples,
            "verdict": None if verdict is None else verdict.as_dict() | {
                "action": str(verdict.action)
            },
            "registry": {
                "reachable": not self._problem,
                "problem": self._problem,
                "since_s": self._problem_since_s if self._problem else None,
                "read_s": self._read_s,
            },
        }  # fmt: skip

    def _follow(self, found: ModelState, state: RolloutState | None, now_s: float) -> None:
        self._state = state
        if state is None or not state.live:
            self._guard = self._verdict = None
            self._taken()
            return
        if state.ending is not None:
            self._do(found, state, Recovered(now_s))
            return
        guard = self._watching(state, now_s)
        refused = self.desk.registry.version(self.model, state.challenger).tags.get(REFUSED_TAG)
        if refused:
            reason = f"version {state.challenger} was refused: {refused}"
            event = Operator(Command.ROLL_BACK, now_s, by="controller", reason=reason)
            self._do(found, state, event)
            return
        self._feed(guard, state, now_s)
        self._verdict = guard.handle(Tick(now_s))
        self._do(found, state, Judged(self._verdict))

    def _watching(self, state: RolloutState, now_s: float) -> Guard:
        """The guard of this rollout, told of whatever changed."""
        guard, known = self._guard, self._watched
        if guard is None or known is None or known.id != state.id:
            guard = self._guard = Guard(state)
        elif known != state:
            guard.handle(Moved(now_s, state))
        self._watched = state
        return guard

    def _taken(self) -> tuple[Report | None, list[tuple[str, float, float]]]:
        """What waited, which is then no longer kept here."""
        with self._lock:
            report, self._report = self._report, None
            labels, self._labels = self._labels, []
        return report, labels

    def _feed(self, guard: Guard, state: RolloutState, now_s: float) -> None:
        report, labels = self._taken()
        if report is not None:
            try:
                guard.handle(Observed(now_s, report))
            except InputError as error:
                _LOG.info("a report of another rollout is left out: %s", error)
        if labels:
            guard.handle(Labelled(now_s, sketches(labels, state)))

    def _do(self, found: ModelState, state: RolloutState, event: Event) -> None:
        after = self.desk.advance(self.model, found, state, event)
        self._state = after
        if after is not state and self._guard is not None:
            self._guard.handle(Moved(self._clock(), after))
            self._watched = after


def sketches(rows: list[tuple[str, float, float]], state: RolloutState) -> dict[str, LabelSketch]:
    """Labels by version; rows whose label is neither 0 nor 1 are left out."""
    by_version: dict[str, tuple[list[float], list[float]]] = {}
    for version, score, label in rows:
        if label in (0.0, 1.0):
            scores, labels = by_version.setdefault(version, ([], []))
            scores.append(score)
            labels.append(label)
    return {
        version: LabelSketch.of(state.bins, scores, labels)
        for version, (scores, labels) in by_version.items()
    }
