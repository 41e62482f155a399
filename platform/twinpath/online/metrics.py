"""Prometheus metrics of a served graph, through Ray's exporter: one table of them.

Ray prefixes every name with ``ray_`` and adds the labels of its own defaults. Values are kept and
handed to Ray ten times a second, which costs a request a fraction of what one call does.
"""

import asyncio
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from twinpath.online.batcher import Timing
from twinpath.online.dataplane import Ask

FLUSH_S = 0.1

_SECONDS = [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30]
_ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384]

#: Name → (kind, buckets, labels beside ``graph``, what it says).
TABLE: dict[str, tuple[str, list[float], tuple[str, ...], str]] = {
    "twinpath_requests": (
        "counter", [], ("transport", "status"), "Inference requests answered.",
    ),
    "twinpath_rows": ("counter", [], (), "Rows that were run."),
    "twinpath_queue_seconds": (
        "histogram", _SECONDS, (), "Time that a request waited for its batch.",
    ),
    "twinpath_batch_rows": ("histogram", [float(n) for n in _ROWS], (), "Rows of a batch."),
    "twinpath_batch_seconds": ("histogram", _SECONDS, (), "Time that a batch ran."),
    "twinpath_node_seconds": (
        "histogram", _SECONDS, ("node",), "Time that a node took in a batch.",
    ),
}  # fmt: skip


class GraphMetrics:
    """The metrics of `TABLE` for one graph in one replica."""

    def __init__(self, graph: str) -> None:
        from ray.util import metrics

        self._graph = graph
        self._metrics: dict[str, Any] = {}
        for name, (kind, buckets, labels, text) in TABLE.items():
            made = (
                metrics.Counter(name, text, tag_keys=("graph", *labels))
                if kind == "counter"
                else metrics.Histogram(name, text, buckets, tag_keys=("graph", *labels))
            )
            self._metrics[name] = made.set_default_tags({"graph": graph})
        self._values: dict[tuple[str, tuple[str, ...]], list[float]] = defaultdict(list)
        self._counts: Counter[tuple[str, tuple[str, ...]]] = Counter()
        self._due = False

    def request(self, ask: Ask, status: int) -> None:
        """A request was answered."""
        self._counts["twinpath_requests", (ask.transport, str(status))] += 1
        if ask.timing is not None:
            self._values["twinpath_queue_seconds", ()].append(ask.timing.queue_s)
        if not self._due:
            self._due = True
            asyncio.get_running_loop().call_later(FLUSH_S, self.flush)

    def batch(self, timing: Timing) -> None:
        """A batch was run."""
        self._counts["twinpath_rows", ()] += timing.batch_rows
        self._values["twinpath_batch_rows", ()].append(timing.batch_rows)
        self._values["twinpath_batch_seconds", ()].append(timing.run_s)
        for node, seconds in timing.nodes_s.items():
            self._values["twinpath_node_seconds", (node,)].append(seconds)

    def flush(self) -> None:
        """Hand everything to Ray."""
        self._due = False
        for (name, labels), count in self._counts.items():
            self._metrics[name].inc(count, tags=self._tags(name, labels))
        for (name, labels), values in self._values.items():
            observe_all(self._metrics[name], values, self._tags(name, labels))
        self._counts.clear()
        self._values.clear()

    def _tags(self, name: str, labels: tuple[str, ...]) -> dict[str, str]:
        return dict(zip(TABLE[name][2], labels, strict=True))


def observe_all(histogram: Any, values: Sequence[float], tags: dict[str, str]) -> None:
    """``histogram.observe`` for each value, with the tags put together and checked once."""
    if not values:
        return
    histogram.observe(values[0], tags=tags)
    recorder = getattr(histogram, "_metric", None)
    if recorder is None:  # Ray discards this metric
        return
    final = histogram._get_final_tags(tags)
    for value in values[1:]:
        recorder.record(value, tags=final)
