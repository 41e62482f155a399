"""BentoML: ``bentoml serve benchmarks.online.servers.bentoml_service:Service``."""

import os
from typing import Annotated

import bentoml
import numpy as np
from bentoml.validators import DType

from benchmarks.online.models import load


@bentoml.service(
    # One for each of two cores, as its documentation advises: faster here than one.
    workers=2,
    logging={"access": {"enabled": False}},
    metrics={"enabled": False},
    traffic={"timeout": 60},
)
class Service:
    """Rows in, rows out."""

    def __init__(self) -> None:
        self._predict = load(os.environ["BENCHMARK_MODEL"])

    # The latency that adaptive batching aims at: batches grow and shrink to keep below it.
    @bentoml.api(batchable=True, max_batch_size=256, max_latency_ms=1000)
    def predict(self, x: Annotated[np.ndarray, DType("float32")]) -> np.ndarray:
        """Requests joined by BentoML."""
        return self._predict(x)
