"""What an operator may ask for when a rollout starts: over HTTP, and by the command line."""

import os
from typing import Any

from pydantic import Field, ValidationError

from twinpath.errors import InputError
from twinpath.online.strict import Strict
from twinpath.rollout.bins import Bins
from twinpath.rollout.state import Kind, RolloutState, Share, Thresholds


class StartRequest(Strict):
    """A rollout to start; what is left out has the defaults of `RolloutState`.

    ``again``: also a version that was refused before, whose refusal is taken back.
    """

    challenger: str = Field(pattern=r"^[0-9]+$")
    kind: Kind = Kind.CANARY
    alias: str = Field("champion", min_length=1, max_length=64)
    steps: tuple[Share, ...] | None = None
    shadow_first: Share = 0.0
    key: tuple[str, ...] | None = None
    segments: tuple[str, ...] = ()
    bins: Bins = Bins()
    minimum_samples: int = Field(1000, ge=1)
    minimum_time_s: float = Field(60.0, ge=0)
    thresholds: Thresholds = Thresholds()
    reason: str = Field("", max_length=1000)
    again: bool = False

    @classmethod
    def read(cls, given: Any) -> "StartRequest":
        """From JSON. Raises InputError that names what is wrong."""
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            raise InputError(f"the rollout cannot be read: {_first(error)}") from None

    def state(self, model: str, incumbent: str, now_s: float) -> RolloutState:
        """The state to start from. Raises InputError that names what does not fit."""
        fields = {
            name: getattr(self, name)
            for name in StartRequest.model_fields
            if name not in ("again", "steps")
        }
        steps = self.steps or ((1.0,) if self.kind is Kind.SHADOW else None)
        if self.kind is Kind.AB:
            steps = self.steps or (0.5,)
        if steps is not None:
            fields["steps"] = steps
        name = f"{incumbent}-{self.challenger}-{int(now_s):x}{os.urandom(2).hex()}"
        try:
            return RolloutState(id=name, model=model, incumbent=incumbent, **fields)
        except ValidationError as error:
            raise InputError(f"the rollout cannot be started: {_first(error)}") from None


def _first(error: ValidationError) -> str:
    wrong = error.errors(include_url=False)[0]
    where = ".".join(map(str, wrong["loc"]))
    return f"{where}: {wrong['msg']}" if where else str(wrong["msg"])
