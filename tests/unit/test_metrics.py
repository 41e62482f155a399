"""Metrics of a served graph: exact counts, in the series that Prometheus makes of a histogram."""

import asyncio
from typing import Any

from twinpath.online.batcher import Timing
from twinpath.online.dataplane import Ask
from twinpath.online.metrics import COUNTERS, HISTOGRAMS, SUMS, Buckets, GraphMetrics
from twinpath.online.statistics import Statistics


class Recorder:
    """Takes metrics instead of Ray, by name and labels."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}

    def make(self, kind: str, name: str, text: str, labels: tuple[str, ...]) -> Any:
        recorder = self

        class Metric:
            def set(self, value: float, tags: dict[str, str]) -> None:
                assert set(tags) == set(labels)
                assert kind == "Gauge"
                recorder.values[name, tuple(sorted(tags.items()))] = value

            def inc(self, value: float, tags: dict[str, str]) -> None:
                assert set(tags) == set(labels)
                assert kind == "Counter"
                key = name, tuple(sorted(tags.items()))
                recorder.values[key] = recorder.values.get(key, 0) + value

        assert text
        return Metric()

    def get(self, name: str, **labels: str) -> float:
        return self.values[name, tuple(sorted(labels.items()))]


def test_a_bucket_holds_what_is_at_most_its_bound():
    buckets = Buckets((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        buckets.observe(value)
    assert buckets.cumulative() == [("1", 2), ("2", 3), ("+Inf", 4)]
    assert buckets.total == 12.0


async def test_requests_and_batches_are_counted_exactly():
    recorder = Recorder()
    statistics = Statistics()
    metrics = GraphMetrics(recorder.make, statistics)
    for queue_s, status in ((0.0001, 200), (0.003, 200), (0.3, 503)):
        asked = Ask("g", {})
        asked.timing = Timing(queue_s, 0.01, 4, {"a": 0.004})
        metrics.request(asked, status, queue_s + 0.01)
        statistics.request(2, asked.timing, queue_s + 0.01, True, 0.25, 0.5)
    metrics.batch(Timing(0.0, 0.01, 4, {"a": 0.004, "b": 0.2}))
    metrics.flush()
    metrics.flush()  # cumulative values are set, not added again
    assert recorder.get("twinpath_requests", transport="http", status="200") == 2
    assert recorder.get("twinpath_requests", transport="http", status="503") == 1
    assert recorder.get("twinpath_rows") == 4
    assert recorder.get("twinpath_queue_seconds_count") == 3
    assert recorder.get("twinpath_queue_seconds_bucket", le="0.0005") == 1
    assert recorder.get("twinpath_queue_seconds_bucket", le="0.005") == 2
    assert recorder.get("twinpath_queue_seconds_bucket", le="+Inf") == 3
    assert recorder.get("twinpath_batch_rows_sum") == 4
    assert recorder.get("twinpath_decode_seconds_count") == 3
    assert recorder.get("twinpath_decode_seconds_sum") == 0.75
    assert recorder.get("twinpath_encode_seconds_count") == 3
    assert recorder.get("twinpath_encode_seconds_sum") == 1.5
    assert recorder.get("twinpath_node_seconds_bucket", node="b", le="0.1") == 0
    assert recorder.get("twinpath_node_seconds_bucket", node="b", le="0.2") == 1
    await asyncio.sleep(0)


def test_names_say_their_unit():
    for name in (*HISTOGRAMS, *SUMS):
        assert name.endswith(("_seconds", "_rows"))
    assert not set(COUNTERS) & set(HISTOGRAMS)
