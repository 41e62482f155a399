"""Reports that a challenger needs before a rollout: kept as tags of its version."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from twinpath.errors import RolloutError

#: Tag of a registered model: the reports that its rollouts need, as a JSON list.
REQUIRE_TAG = "twinpath.require"
#: Tag of a version for each report: ``twinpath.gate.backtest``, ``twinpath.gate.loadtest``.
GATE_TAG = "twinpath.gate."
KINDS = ("backtest", "loadtest")


@dataclass(frozen=True, slots=True)
class Gate:
    """A report in short: whether the challenger passed against this incumbent, when (seconds
    since 1970), why, its figures, and where the report lies."""

    kind: str
    passed: bool
    incumbent: str
    time_s: float
    reason: str
    figures: Mapping[str, Any]
    report: str = ""

    def to_tag(self) -> str:
        """JSON for the tag."""
        return json.dumps(
            {
                "passed": self.passed,
                "incumbent": self.incumbent,
                "time_s": self.time_s,
                "reason": self.reason[:500],
                "figures": dict(self.figures),
                "report": self.report,
            },
            separators=(",", ":"),
        )


def gates_of(tags: Mapping[str, str]) -> dict[str, Gate]:
    """The reports among the tags of a version, by kind; what cannot be read counts as absent."""
    found = {}
    for kind in KINDS:
        try:
            given = json.loads(tags.get(GATE_TAG + kind, ""))
            found[kind] = Gate(
                kind, bool(given["passed"]), str(given["incumbent"]), float(given["time_s"]),
                str(given["reason"]), given["figures"], str(given["report"]),
            )  # fmt: skip
        except (ValueError, KeyError, TypeError):
            continue
    return found


def required(tags: Mapping[str, str], configured: Iterable[str] = ()) -> tuple[str, ...]:
    """What a model's rollouts need: by the server's config, and by the model's own tag."""
    try:
        listed = json.loads(tags.get(REQUIRE_TAG, "[]"))
    except ValueError:
        listed = KINDS  # who wrote the tag wanted something: be strict
    asked = {*configured, *(each for each in listed if isinstance(each, str))}
    return tuple(kind for kind in KINDS if kind in asked)


def check(
    needed: Iterable[str],
    tags: Mapping[str, str],
    model: str,
    incumbent: str,
    challenger: str,
) -> None:
    """Raises RolloutError, with the command to run, unless the challenger has passed all."""
    gates = gates_of(tags)
    for kind in needed:
        gate = gates.get(kind)
        command = f"twinpath rollout {kind} MODULE:GRAPH --model {model} --challenger {challenger}"
        if gate is None:
            raise RolloutError(
                f"version {challenger} of {model!r} has no {kind}, which its rollouts need: run "
                f"`{command} --data ROWS.parquet`"
            )
        if gate.incumbent != incumbent:
            raise RolloutError(
                f"the {kind} of version {challenger} of {model!r} was against version "
                f"{gate.incumbent}, and version {incumbent} serves now: run "
                f"`{command} --data ROWS.parquet` again"
            )
        if not gate.passed:
            raise RolloutError(
                f"version {challenger} of {model!r} did not pass its {kind}: {gate.reason}"
            )
