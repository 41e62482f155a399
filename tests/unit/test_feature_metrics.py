"""What lookups read becomes counters and gauges."""

import asyncio
from typing import Any

import pytest

from twinpath.features.online import ReadStatistics
from twinpath.nodes.features import FeatureLookup
from twinpath.online import feature_metrics
from twinpath.online.feature_metrics import AGES, COUNTS, FeatureMetrics


class Made:
    """Keeps what gauges and counters were told."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def make(self, kind: str, name: str, text: str, labels: tuple[str, ...]) -> Any:
        assert text
        values = self.values

        class Metric:
            def inc(self, value: float, tags: dict[str, str]) -> None:
                assert (kind, set(tags)) == ("Counter", set(labels))
                values[name] = values.get(name, 0) + value

            def set(self, value: float, tags: dict[str, str]) -> None:
                assert (kind, set(tags)) == ("Gauge", set(labels))
                values[name] = value

        return Metric()


@pytest.fixture
def lookup(monkeypatch: pytest.MonkeyPatch) -> FeatureLookup:
    """A lookup whose statistics stand still."""
    kept = ReadStatistics()
    monkeypatch.setattr(FeatureLookup, "statistics", property(lambda _: kept))
    return object.__new__(FeatureLookup)


def test_counters_get_what_is_new_and_gauges_what_is(lookup: FeatureLookup):
    made = Made()
    metrics = FeatureMetrics(made.make, {"lookup": lookup, "other": object()})
    metrics.flush()
    assert made.values == {}
    lookup.statistics.reads, lookup.statistics.rows = 2, 40
    lookup.statistics.age_mean_s, lookup.statistics.age_max_s = 3.5, 9.0
    metrics.flush()
    lookup.statistics.rows = 45
    metrics.flush()
    assert made.values == {
        "twinpath_feature_reads": 2, "twinpath_feature_rows": 45,
        "twinpath_feature_age_mean_s": 3.5, "twinpath_feature_age_max_s": 9.0,
    }  # fmt: skip


async def test_they_are_flushed_soon_after_a_batch(
    lookup: FeatureLookup, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(feature_metrics, "FLUSH_S", 0.01)
    made = Made()
    metrics = FeatureMetrics(made.make, {"lookup": lookup})
    lookup.statistics.reads = 1
    metrics.soon()
    metrics.soon()
    await asyncio.sleep(0.05)
    assert made.values["twinpath_feature_reads"] == 1


def test_every_statistic_is_a_metric():
    assert {*COUNTS, *AGES} == set(ReadStatistics.__slots__)


def test_a_graph_without_a_lookup_makes_no_metric():
    made = Made()
    FeatureMetrics(made.make, {"other": object()}).flush()
    assert made.values == {}
