"""A language model engine's metrics through Ray's exporter, beside those of its graph.

Histograms go out as the cumulative series that they are, like those of `metrics`: names are vLLM's
with ``_`` for ``:``, so ``ray_vllm_time_to_first_token_seconds_bucket`` and so on.
"""

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from twinpath.nodes.llm_metrics import Sample

EVERY_S = 1.0
#: So often all values are handed over: Ray's exporter forgets a gauge that nobody sets for two of
#: its intervals, of 10 seconds, and an engine may have nothing to do for longer.
ALL_EVERY = 3


class EngineMetrics:
    """The metrics of one engine. ``read`` gives its values, ``make`` makes a gauge; see
    `metrics.ray_metric`."""

    def __init__(
        self,
        graph: str,
        replica: str,
        read: Callable[[], Iterable[Sample]],
        make: Callable[[str, str, str, tuple[str, ...]], Any],
    ) -> None:
        self._fixed = {"graph": graph, "replica": replica}
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
                labels = ("graph", "replica", "le") if sample.le else ("graph", "replica")
                name = sample.name.replace(":", "_")
                gauge = self._gauges[sample.name] = self._make("Gauge", name, sample.text, labels)
            tags = self._fixed | ({"le": sample.le} if sample.le else {})
            gauge.set(sample.value, tags=tags)

    async def publish(self) -> None:
        """Flush once a second, for ever."""
        while True:
            self.flush()
            await asyncio.sleep(EVERY_S)
