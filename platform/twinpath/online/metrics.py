"""Prometheus metrics of a served graph, through Ray's exporter: one table of them.

Ray prefixes every name with ``ray_``. Its own histograms are replayed observation by observation in
the agent of each node (Ray 2.60, ``record_histogram_aggregated_batch``), which at thousands of
requests a second takes most of a core. Ours are kept here, exactly, and set as the cumulative
``_bucket``, ``_sum`` and ``_count`` series that Prometheus makes of a histogram:
``histogram_quantile(0.99, rate(ray_twinpath_queue_seconds_bucket[1m]))`` works as ever.
"""

import asyncio
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

from twinpath.online.batcher import Timing
from twinpath.online.dataplane import Ask
from twinpath.online.statistics import Duration, Statistics

FLUSH_S = 1.0

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384)

#: Makes a gauge or counter by kind, name, text and labels; see `replica_metrics`.
Make = Callable[[str, str, str, tuple[str, ...]], Any]

#: Name → (labels beside those of `replica_metrics`, what it says).
COUNTERS = {
    "twinpath_requests": (("transport", "status"), "Inference requests answered."),
    "twinpath_rows": ((), "Rows that were run."),
}
#: Name → (upper bounds of the buckets, label, what it says).
HISTOGRAMS: dict[str, tuple[tuple[float, ...], tuple[str, ...], str]] = {
    "twinpath_request_seconds": (_SECONDS, (), "Time from a whole request to its answer."),
    "twinpath_queue_seconds": (_SECONDS, (), "Time that a request waited for its batch."),
    "twinpath_batch_rows": (_ROWS, (), "Rows of a batch."),
    "twinpath_batch_seconds": (_SECONDS, (), "Time that a batch ran."),
    "twinpath_node_seconds": (_SECONDS, ("node",), "Time that a node took in a batch."),
}
#: Name → (what `Statistics` has of it, what it says). Only ``_sum`` and ``_count``: to find a
#: bucket would cost every request something, and these two are counted for clients in any case.
SUMS = {
    "twinpath_decode_seconds": ("compute_input", "Time to read the rows of a request."),
    "twinpath_encode_seconds": ("compute_output", "Time to write the answer of a request."),
}


class Buckets:
    """One histogram: counts by bucket, not yet cumulative, and the sum of what was observed."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Add a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulative(self) -> list[tuple[str, int]]:
        """Prometheus' ``le`` label → how many values are at most that."""
        bounds = [*(f"{bound:g}" for bound in self.bounds), "+Inf"]
        found, so_far = [], 0
        for bound, count in zip(bounds, self.counts, strict=True):
            so_far += count
            found.append((bound, so_far))
        return found


class GraphMetrics:
    """The metrics of one graph in one replica."""

    def __init__(self, make: Make, statistics: Statistics) -> None:
        self._statistics = statistics
        self._counters = {
            name: make("Counter", name, text, labels) for name, (labels, text) in COUNTERS.items()
        }
        self._gauges = {
            f"{name}_{part}": make("Gauge", f"{name}_{part}", text, (*labels, *more))
            for name, (_, labels, text) in HISTOGRAMS.items()
            for part, more in (("bucket", ("le",)), ("sum", ()), ("count", ()))
        }
        self._gauges |= {
            f"{name}_{part}": make("Gauge", f"{name}_{part}", text, ())
            for name, (_, text) in SUMS.items()
            for part in ("sum", "count")
        }
        self._counts: Counter[tuple[str, tuple[str, ...]]] = Counter()
        #: Requests by transport and status.
        self._answers: defaultdict[tuple[str, int], int] = defaultdict(int)
        self._buckets = {
            (name, ""): Buckets(bounds)
            for name, (bounds, labels, _) in HISTOGRAMS.items()
            if not labels
        }
        self._request = self._buckets["twinpath_request_seconds", ""]
        self._queue = self._buckets["twinpath_queue_seconds", ""]
        self._due = False
        #: Flushed with these.
        self.also: list[Callable[[], None]] = []

    def request(self, ask: Ask, status: int, total_s: float) -> None:
        """A request was answered."""
        self._answers[ask.transport, status] += 1
        self._request.observe(total_s)
        if ask.timing is not None:
            self._queue.observe(ask.timing.queue_s)
        if not self._due:
            self._due = True
            asyncio.get_running_loop().call_later(FLUSH_S, self.flush)

    def batch(self, timing: Timing) -> None:
        """A batch was run."""
        self._counts["twinpath_rows", ()] += timing.batch_rows
        self._buckets["twinpath_batch_rows", ""].observe(timing.batch_rows)
        self._buckets["twinpath_batch_seconds", ""].observe(timing.run_s)
        for node, seconds in timing.nodes_s.items():
            found = self._buckets.get(("twinpath_node_seconds", node))
            if found is None:
                found = self._buckets["twinpath_node_seconds", node] = Buckets(_SECONDS)
            found.observe(seconds)

    def flush(self) -> None:
        """Hand everything to the exporter."""
        self._due = False
        for (transport, status), count in self._answers.items():
            self._counts["twinpath_requests", (transport, str(status))] += count
        self._answers.clear()
        for (name, values), count in self._counts.items():
            labels = dict(zip(COUNTERS[name][0], values, strict=True))
            self._counters[name].inc(count, tags=labels)
        self._counts.clear()
        for (name, value), buckets in self._buckets.items():
            tags = dict.fromkeys(HISTOGRAMS[name][1], value)
            series = buckets.cumulative()
            for bound, count in series:
                self._gauges[f"{name}_bucket"].set(count, tags=tags | {"le": bound})
            self._gauges[f"{name}_count"].set(series[-1][1], tags=tags)
            self._gauges[f"{name}_sum"].set(buckets.total, tags=tags)
        for name, (stage, _) in SUMS.items():
            spent: Duration = getattr(self._statistics, stage)
            self._gauges[f"{name}_count"].set(spent.count, tags={})
            self._gauges[f"{name}_sum"].set(spent.seconds, tags={})
        for flush in self.also:
            flush()


def ray_metrics(**fixed: str) -> Make:
    """Makes Ray's metrics, each with these labels beside its own."""
    from ray.util import metrics

    def make(kind: str, name: str, text: str, labels: tuple[str, ...]) -> Any:
        made = getattr(metrics, kind)(name, text, tag_keys=(*fixed, *labels))
        made.set_default_tags(fixed)
        return made

    return make


def replica_metrics(graph: str) -> Make:
    """`ray_metrics` with the labels ``application``, ``graph`` and ``replica`` of the Serve replica
    that this runs in."""
    from ray import serve

    context = serve.get_replica_context()
    return ray_metrics(
        application=context.app_name, graph=graph, replica=context.replica_id.unique_id
    )
