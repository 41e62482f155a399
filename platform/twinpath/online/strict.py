"""Settings in which a typo is refused with the key that was probably meant."""

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from twinpath.errors import did_you_mean


class Strict(BaseModel):
    """A model that refuses unknown keys and says which one was probably meant."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, given: Any) -> Any:
        refuse_unknown(given, cls.model_fields)
        return given


def refuse_unknown(given: Any, known: Iterable[str]) -> None:
    """Raises ValueError for the first key that is not known, with the one that was meant."""
    names = list(known)
    for key in given if isinstance(given, dict) else ():
        if key not in names:
            raise ValueError(f"unknown key {key!r}.{did_you_mean(str(key), names)}")
