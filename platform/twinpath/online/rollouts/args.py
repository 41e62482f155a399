"""What a serve config says about rollouts, under ``args: rollouts:``."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from twinpath.online.strict import Strict


class RolloutArgs(Strict):
    """Rollouts of the registry models of a graph.

    ``require``: reports that a challenger must have before a rollout starts (``twinpath rollout
    backtest``, ``twinpath rollout loadtest``). ``audit_log``: a file on the controller's node that
    a line of JSON is appended to for each step, beside the registry, which holds all of them.
    ``feedback_rows``, ``feedback_age_s``: scores that each replica keeps for labels to come.
    ``webhook_secret_file``: a file with the secret of MLflow's webhooks, which are taken then.
    """

    require: tuple[Literal["backtest", "loadtest"], ...] = ()
    audit_log: Path | None = None
    interval_s: float = Field(1.0, gt=0, le=60)
    feedback_rows: int = Field(100_000, ge=0)
    feedback_age_s: float = Field(3600.0, gt=0)
    webhook_secret_file: Path | None = None
