"""What the guard says: go on, hold or roll back, with the figures behind it."""

import enum
import math
from dataclasses import asdict, dataclass, field
from typing import Any


class Action(enum.StrEnum):
    """``promote`` is to the next step, or to the end of the last one."""

    PROMOTE = "promote"
    HOLD = "hold"
    ROLL_BACK = "roll_back"


@dataclass(frozen=True, slots=True)
class Finding:
    """One comparison of challenger and incumbent.

    #: ``size`` is the difference in the check's own unit and ``low`` its lower bound; ``threshold``
    #: is what matters. ``log_e`` is the evidence (natural logarithm of an e-value) that there is
    #: any difference for the worse, and ``needed`` what the error rate asks for.
    ``segment`` is ``column=value``, or empty for all rows. The counts are rows, or calls for
    latency, or labels.
    """

    check: str
    size: float
    low: float
    threshold: float
    log_e: float
    needed: float
    incumbent_count: int
    challenger_count: int
    segment: str = ""
    #: What ``size`` is where there is no difference.
    equal: float = 0.0

    @property
    def harmful(self) -> bool:
        """Certain, and large enough to matter."""
        return self.log_e >= self.needed and self.low > self.threshold

    @property
    def suspicious(self) -> bool:
        """A difference, and its estimate is large enough to matter: reason to wait for more."""
        return self.size > self.threshold and self.low > self.equal

    def __str__(self) -> str:
        where = f" where {self.segment}" if self.segment else ""
        return (
            f"{self.check}{where}: {self.size:.4g} (at least {self.low:.4g}), threshold "
            f"{self.threshold:.4g}, evidence {self.log_e:.1f} of {self.needed:.1f} nats, "
            f"{self.challenger_count} against {self.incumbent_count}"
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON: numbers that are not finite become None."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }


@dataclass(frozen=True, slots=True)
class Verdict:
    """A verdict on one step of one rollout, with the findings that led to it, worst first."""

    action: Action
    reason: str
    rollout: str
    step: int
    now_s: float
    findings: tuple[Finding, ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"findings": [finding.as_dict() for finding in self.findings]}
