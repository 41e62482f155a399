"""Lines of the audit log of rollouts: what was decided, when, by whom and on what evidence."""

import datetime as dt
import json
from typing import Any

from twinpath.rollout.state import RolloutState
from twinpath.rollout.verdict import Verdict


def line_of(
    state: RolloutState,
    event: str,
    now_s: float,
    *,
    by: str = "",
    verdict: Verdict | None = None,
) -> dict[str, Any]:
    """One line, of JSON types only. ``state`` is the one that the event led to.

    ``id`` is the same for the same event: who writes a line twice after a crash can tell.
    """
    line: dict[str, Any] = {
        "id": f"{state.id}/{event}/{state.step}/{state.step_started_s:.3f}",
        "time": dt.datetime.fromtimestamp(now_s, dt.UTC).isoformat(timespec="milliseconds"),
        "event": event,
        "rollout": state.id,
        "model": state.model,
        "incumbent": state.incumbent,
        "challenger": state.challenger,
        "kind": str(state.kind),
        "step": state.step,
        "share": state.share,
        "mirror": state.mirror,
        "status": str(state.status),
        "by": by or ("guard" if verdict else "controller"),
        "reason": verdict.reason if verdict else state.reason,
    }
    if verdict:
        line["evidence"] = [finding.as_dict() for finding in verdict.findings]
    return line


def encode(line: dict[str, Any]) -> str:
    """The line as JSON Lines has it, with its line feed."""
    return json.dumps(line, separators=(",", ":"), allow_nan=False, ensure_ascii=False) + "\n"
