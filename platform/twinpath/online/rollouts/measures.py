"""Prometheus metrics of rollouts, through Ray's exporter."""

from collections.abc import Sequence
from typing import Any

from twinpath.online.metrics import Make
from twinpath.online.rollouts.director import Director

#: Name → (labels beside ``application``, ``graph`` and ``model``, what it says).
GAUGES: dict[str, tuple[tuple[str, ...], str]] = {
    "twinpath_rollout_live": ((), "1 while a rollout is under way."),
    "twinpath_rollout_step": ((), "Index of the step; -1: shadow first."),
    "twinpath_rollout_share": (("version",), "Part of the rows that a version answers."),
    "twinpath_rollout_samples": ((), "Rows that the challenger scored in this step."),
    "twinpath_rollout_evidence": (
        ("check", "segment"),
        "Evidence against the challenger: log e-value over what a roll-back needs.",
    ),
    "twinpath_registry_reachable": ((), "1 while the controller reaches the registry."),
    "twinpath_version_replicas": (
        ("version", "state"),
        "Replicas that have a version in a state, such as refused.",
    ),
}


class RolloutMetrics:
    """The metrics of one graph's rollouts."""

    def __init__(self, make: Make) -> None:
        self._gauges = {
            name: make("Gauge", name, text, ("model", *labels))
            for name, (labels, text) in GAUGES.items()
        }
        #: Series that were set last time, so that those which are gone fall to 0.
        self._set: dict[str, set[tuple[tuple[str, str], ...]]] = {}

    def tell(self, model: str, director: Director, replicas: Sequence[dict[str, Any]]) -> None:
        """Set every gauge of a model."""
        state = director.state
        live = state is not None and state.live
        told: list[tuple[str, dict[str, str], float]] = [
            ("twinpath_rollout_live", {}, float(live)),
            ("twinpath_registry_reachable", {}, float(not director.problem)),
            ("twinpath_rollout_samples", {}, float(director.samples)),
        ]
        if live and state is not None:
            told += [
                ("twinpath_rollout_step", {}, float(state.step)),
                ("twinpath_rollout_share", {"version": state.challenger}, state.share),
                ("twinpath_rollout_share", {"version": state.incumbent}, 1 - state.share),
            ]
        for finding in director.findings:
            labels = {"check": finding.check, "segment": finding.segment}
            part = finding.log_e / finding.needed if finding.needed > 0 else 0.0
            told.append(("twinpath_rollout_evidence", labels, part))
        counts: dict[tuple[str, str], int] = {}
        for replica in replicas:
            for version in replica.get("versions", ()):
                key = (str(version.get("version")), str(version.get("state")))
                counts[key] = counts.get(key, 0) + 1
        for (version, name), count in counts.items():
            labels = {"version": version, "state": name}
            told.append(("twinpath_version_replicas", labels, float(count)))
        self._hand_over(model, told)

    def _hand_over(self, model: str, told: Sequence[tuple[str, dict[str, str], float]]) -> None:
        fixed = {"model": model}
        now: dict[str, set[tuple[tuple[str, str], ...]]] = {name: set() for name in GAUGES}
        for name, labels, value in told:
            now[name].add(tuple(sorted(labels.items())))
            self._gauges[name].set(value, tags=fixed | labels)
        for name in GAUGES:
            key = f"{model}/{name}"
            for gone in self._set.get(key, set()) - now[name]:
                self._gauges[name].set(0.0, tags=fixed | dict(gone))
            self._set[key] = now[name]
