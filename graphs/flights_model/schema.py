"""What a flight looks like at the edge of the graph, and where its artefacts lie."""

import os
from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

#: Names the directory of data, features and models; ``.twinpath/flights`` when unset.
DIRECTORY_VARIABLE = "TWINPATH_FLIGHTS_DIR"


def flights_dir(directory: str | Path | None = None) -> Path:
    """Return the absolute directory of the example: argument, environment, then default."""
    chosen = directory or os.environ.get(DIRECTORY_VARIABLE) or Path(".twinpath") / "flights"
    return Path(chosen).absolute()


class FlightRequest(BaseModel):
    """What is known of a flight before it leaves."""

    model_config = ConfigDict(extra="forbid")

    carrier: str = Field(description="IATA code of the airline", examples=["UA"])
    flight: int = Field(ge=0, description="flight number", examples=[1545])
    tailnum: str | None = Field(
        default=None, description="registration of the aircraft, if assigned", examples=["N14228"]
    )
    origin: Literal["EWR", "JFK", "LGA"] = Field(examples=["EWR"])
    dest: str = Field(description="FAA code of the destination", examples=["IAH"])
    scheduled_departure: datetime = Field(
        description="scheduled departure in UTC", examples=["2013-12-23T22:30:00Z"]
    )
    asked_at: datetime | None = Field(
        default=None,
        description="when the question is asked, in UTC; an hour before departure if not given",
        examples=["2013-12-23T17:00:00Z"],
    )


class DelayPrediction(BaseModel):
    """Whether the flight will arrive more than 15 minutes late, and why."""

    p_delay: float = Field(ge=0, le=1, description="probability of an arrival over 15 min late")
    delayed: bool = Field(description="whether p_delay reaches the threshold")
    reason: str = Field(description="what speaks most for the answer")
    reviewed: bool = Field(description="whether the second model had a say")
