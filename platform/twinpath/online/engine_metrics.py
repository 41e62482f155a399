"""A language model engine's metrics through Ray's exporter, beside those of its graph.

Histograms go out as the cumulative series that they are, like those of `metrics`: names are vLLM's
with ``_`` for ``:``, so ``ray_vllm_time_to_first_token_seconds_bucket`` and so on.
"""

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from twinpath.nodes.llm_metrics import Sample
from twinpath.online.metrics import Make

EVERY_S = 1.0
#: So often all values are handed over: Ray's exporter forgets a gauge that nobody sets for two of
#: its intervals, of 10 seconds, and an engine may have nothing to do for longer.
ALL_EVERY = 3


class EngineMetrics:
    """The metrics of one engine. ``read`` gives its values."""

    def __init__(self, make: Make, read: Callable[[], Iterable[Sample]]) -> None:
        self._read, self._make = read, make
        self._gauges: dict[str, Any] = {}
        self._last: dict[tuple[str, str], float] = {}
        self._flushes = 0

    def flush(self) -> None:
        """Hand what has changed to the exporter, and now and then everything."""
        if self._flushes % ALL_EVERY == 0:
            self._last.clear()
        self._flushes += 1
        for sample in self._read():
            key = sample.name, sample.le
            if self._last.get(key) == sample.value:
                continue
            self._last[key] = sample.value
            gauge = self._gauges.get(sample.name)
            if gauge is None:
                labels = ("le",) if sample.le else ()
                name = sample.name.replace(":", "_")
                gauge = self._gauges[sample.name] = self._make("Gauge", name, sample.text, labels)
            gauge.set(sample.value, tags={"le": sample.le} if sample.le else {})

    async def publish(self) -> None:
        """Flush once a second, for ever."""
        while True:
            self.flush()
            await asyncio.sleep(EVERY_S)
