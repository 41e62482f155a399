"""The state of a rollout: what replicas follow, and all that survives a crash.

It is one small JSON document in the registered model's tag ``twinpath.rollout``. Whoever reads it
knows what to do without anybody else: replicas take the shares from it, a controller that starts
afresh goes on at the step that it names.
"""

import enum
import math
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from twinpath.errors import ConfigError
from twinpath.rollout.bins import Bins

#: The tag of a registered model that holds the state.
TAG = "twinpath.rollout"
#: The tag of a model version that a rollout refused; its text is the reason.
REFUSED_TAG = "twinpath.refused"
#: MLflow holds up to 5,000 characters in a registered model's tag.
LARGEST_TAG = 4_900


class Kind(enum.StrEnum):
    """Shadow: the challenger scores copies and answers nobody. Canary: it answers a share that
    grows in steps. A/B: it answers a fixed share until an operator decides."""

    SHADOW = "shadow"
    CANARY = "canary"
    AB = "ab"


class Status(enum.StrEnum):
    """Running and paused rollouts share traffic out; the others are over."""

    RUNNING = "running"
    PAUSED = "paused"
    PROMOTED = "promoted"
    ROLLED_BACK = "rolled_back"
    ABORTED = "aborted"


class Ending(enum.StrEnum):
    """An end that is decided and saved, and whose actions may not all have been done."""

    PROMOTE = "promote"
    ROLL_BACK = "roll_back"
    ABORT = "abort"


Share = Annotated[float, Field(ge=0, le=1)]


class Thresholds(BaseModel):
    """When a difference matters. A roll-back needs this size **and** the evidence (``alpha``)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: Probability that a rollout of an equal model is rolled back, however long it is watched.
    alpha: float = Field(0.01, gt=0, lt=1)
    #: Rows that fail, challenger less incumbent.
    error_rate: float = Field(0.005, ge=0, lt=1)
    #: The challenger's 99th percentile of a call's time, as a multiple of the incumbent's.
    latency_ratio: float = Field(1.5, ge=1)
    #: Population stability index of the scores; by convention 0.1 is small and 0.25 large.
    psi: float = Field(0.25, gt=0)
    #: Kullback-Leibler divergence of the challenger's scores from the incumbent's, nats.
    kl: float = Field(0.125, gt=0)
    #: The same two within one value of a segment column.
    segment_psi: float = Field(0.5, gt=0)
    segment_kl: float = Field(0.25, gt=0)
    #: Delayed labels: incumbent less challenger, and the rise of the calibration error.
    auc: float = Field(0.02, gt=0, lt=1)
    accuracy: float = Field(0.02, gt=0, lt=1)
    calibration: float = Field(0.05, gt=0, lt=1)
    #: Fall of the mean label, for labels that are a success such as a purchase; None: not judged.
    kpi: float | None = Field(None, gt=0, lt=1)


class RolloutState(BaseModel):
    """One rollout of ``challenger`` over ``incumbent``. Immutable: the machine makes new ones.

    #: ``share`` is the part of the rows that the challenger answers, ``mirror`` the part of the
    #: rows that it scores as well, without answering. Both follow from kind, step and status.
    #: ``step`` is -1 while a canary is shadowed first, else an index of ``steps``.
    #: Times are seconds since the epoch.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: Version of this schema.
    version: Literal[1] = 1
    id: str = Field(min_length=1, max_length=64)
    model: str = Field(min_length=1, max_length=250)
    incumbent: str = Field(min_length=1, max_length=32)
    challenger: str = Field(min_length=1, max_length=32)
    kind: Kind = Kind.CANARY
    alias: str = Field("champion", min_length=1, max_length=64)
    steps: tuple[Share, ...] = Field((0.05, 0.25, 0.5, 1.0), min_length=1, max_length=16)
    #: Part of the rows that are mirrored before the first step; 0: no shadow before the canary.
    shadow_first: Share = 0.0
    step: int = Field(0, ge=-1)
    share: Share = 0.0
    mirror: Share = 0.0
    status: Status = Status.RUNNING
    ending: Ending | None = None
    #: Columns whose values keep a row with its version; None: the row as a whole.
    key: tuple[str, ...] | None = Field(None, max_length=8)
    segments: tuple[str, ...] = Field((), max_length=8)
    bins: Bins = Bins()
    minimum_samples: int = Field(1000, ge=1)
    minimum_time_s: float = Field(60.0, ge=0)
    thresholds: Thresholds = Thresholds()
    reason: str = Field("", max_length=1000)
    started_s: float = 0.0
    step_started_s: float = 0.0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.incumbent == self.challenger:
            raise ValueError(
                f"incumbent and challenger are both version {self.incumbent!r}: "
                "a rollout moves traffic between two versions"
            )
        if list(self.steps) != sorted(set(self.steps)) or self.steps[0] <= 0:
            raise ValueError(f"steps {self.steps}: expected growing shares over 0, up to 1")
        if self.step >= len(self.steps):
            raise ValueError(f"step {self.step}: there are {len(self.steps)} steps")
        if not all(map(math.isfinite, (self.started_s, self.step_started_s))):
            raise ValueError("started_s and step_started_s: expected seconds since the epoch")
        return self

    @property
    def live(self) -> bool:
        """Whether replicas follow this rollout. If not, the alias alone says what serves."""
        return self.status in (Status.RUNNING, Status.PAUSED)

    @property
    def versions(self) -> tuple[str, ...]:
        """The versions that replicas must have loaded for it, incumbent first."""
        if not self.live:
            return ()
        return (self.incumbent, self.challenger) if self.share or self.mirror else (self.incumbent,)

    def to_tag(self) -> str:
        """JSON for the tag. Raises ConfigError when it is longer than a tag may be."""
        text = self.model_dump_json(exclude_defaults=True)
        if len(text) > LARGEST_TAG:
            raise ConfigError(
                f"rollout {self.id!r} takes {len(text)} characters and a tag holds {LARGEST_TAG}: "
                "name fewer key and segment columns, steps or bin edges"
            )
        return text

    @classmethod
    def from_tag(cls, text: str) -> Self:
        """Read a tag. Raises ConfigError that names what is wrong with it."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "document"
            raise ConfigError(
                f"tag {TAG} is no rollout state: {place}: {first['msg']}. It was written by "
                "another version or by hand: abort the rollout, or delete the tag"
            ) from None

    def but(self, **changes: Any) -> Self:
        """A checked copy with these fields changed."""
        return type(self).model_validate(self.model_dump() | changes)
