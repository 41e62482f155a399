"""Arguments of a served graph about its feature store."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from twinpath.online.strict import Strict


class CaptureArgs(Strict):
    """Rows that feature lookups read are appended to Parquet files below ``folder``, for
    ``twinpath features skew``. Each process keeps at most ``max_bytes`` there; ``share`` is the
    share of batches that are captured."""

    folder: Path
    max_bytes: int = Field(64 * 2**20, ge=2**10)
    share: float = Field(1.0, gt=0, le=1)


class PushArgs(Strict):
    """``POST /features/push``. ``callers``: those whose key or token has the scope
    ``features:push`` among its graphs, or anyone whom the gateway lets pass. At most
    ``max_waiting_rows`` wait for the store in each replica; a request that asks to wait does so for
    up to ``max_wait_s`` seconds."""

    callers: Literal["authenticated", "anyone"] = "authenticated"
    max_waiting_rows: int = Field(100_000, ge=1)
    max_wait_s: float = Field(5.0, gt=0)


class FeatureArgs(Strict):
    """``capture`` is off unless given; ``push`` is there for graphs with a FeatureLookup, null
    takes it away."""

    capture: CaptureArgs | None = None
    push: PushArgs | None = PushArgs()
