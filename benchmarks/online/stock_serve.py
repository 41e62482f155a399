"""Ray Serve as its documentation shows it: a deployment with ``@serve.batch``, all defaults of
Serve's HTTP proxy."""

import os

import numpy as np
from ray import serve
from starlette.requests import Request

from benchmarks.online.models import load


# Serve's default of 5 running requests would keep batches from ever forming.
@serve.deployment(max_ongoing_requests=256)
class Model:
    """Rows in, rows out."""

    def __init__(self, name: str) -> None:
        self._predict = load(name)

    # As it comes: up to 10 requests, for which it waits 10 ms. Up to 64 without waiting answer a
    # lone connection sooner, but 32 connections more slowly.
    @serve.batch
    async def predict(self, given: list[np.ndarray]) -> list[np.ndarray]:
        """Requests joined by Serve."""
        stops = np.cumsum([len(x) for x in given])[:-1]
        return np.split(self._predict(np.concatenate(given)), stops)

    async def __call__(self, request: Request) -> dict[str, list]:
        """One request."""
        x = np.asarray((await request.json())["x"], dtype=np.float32)
        return {"y": (await self.predict(x)).tolist()}


app = Model.bind(os.environ.get("BENCHMARK_MODEL", "echo"))
