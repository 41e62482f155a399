"""Placement: how a node runs. Nothing said means fused into its neighbours' process."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Replicas(_Settings):
    """How many replicas, and the queue that each should have: ``Replicas(0, 4, target_queue=8)``.

    ``target_queue`` counts rows that wait or run per replica. Raises ``ValidationError`` when
    ``max`` is below ``min``.
    """

    min: int = Field(1, ge=0)
    max: int = Field(1, ge=1)
    target_queue: float = Field(2.0, gt=0)
    upscale_delay_s: float = Field(1.0, ge=0)
    downscale_delay_s: float = Field(30.0, ge=0)

    def __init__(self, *bounds: int, **settings: Any) -> None:
        if len(bounds) > 2:
            raise TypeError(f"Replicas takes at most (min, max), got {len(bounds)} numbers")
        if len(bounds) == 1:
            settings = {"max": bounds[0]} | settings
        super().__init__(**dict(zip(("min", "max"), bounds, strict=False)), **settings)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max < self.min:
            raise ValueError(f"max ({self.max}) is below min ({self.min}): raise max or lower min")
        return self

    @property
    def fixed(self) -> bool:
        """Whether the number of replicas never changes."""
        return self.min == self.max


class Batch(_Settings):
    """How requests are joined: at most ``max_size`` rows; with a free slot a batch that is not
    full is held up to ``max_wait_ms`` milliseconds (0: it leaves at once)."""

    max_size: int = Field(256, ge=1)
    max_wait_ms: float = Field(0.0, ge=0)


class Placement(_Settings):
    """Own replicas online, an own actor pool offline.

    ``num_cpus``/``num_gpus``/``resources`` are Ray's logical resources for each replica.
    """

    num_cpus: float | None = Field(None, ge=0)
    num_gpus: float = Field(0.0, ge=0)
    resources: dict[str, float] = Field(default_factory=dict)
    replicas: Replicas = Replicas()
    batch: Batch = Batch()

    def ray_actor_options(self) -> dict[str, Any]:
        """Ray's options for one replica or actor: ``num_cpus``, ``num_gpus``, ``resources``."""
        options: dict[str, Any] = {}
        if self.num_cpus is not None:
            options["num_cpus"] = self.num_cpus
        if self.num_gpus:
            options["num_gpus"] = self.num_gpus
        if self.resources:
            options["resources"] = dict(self.resources)
        return options
