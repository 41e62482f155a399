"""An engine's own metrics, handed on to Ray's exporter."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram

from twinpath.nodes.llm_metrics import EXPORTED, Sample, samples
from twinpath.online.engine_metrics import ALL_EVERY, EngineMetrics


class Recorder:
    """Stands for Ray's exporter: what was set last."""

    def __init__(self) -> None:
        self.values: dict[tuple[Any, ...], float] = {}
        self.calls = 0

    def make(self, kind: str, name: str, text: str, labels: tuple[str, ...]) -> Any:
        assert kind == "Gauge"
        assert text
        recorder = self

        class Gauge:
            def set(self, value: float, tags: dict[str, str]) -> None:
                assert set(tags) == set(labels)
                recorder.calls += 1
                recorder.values[name, tags.get("le", "")] = value

        return Gauge()


def test_histograms_and_counters_are_read_as_prometheus_has_them():
    # Not the process' own: an engine that ran here before has its metrics there.
    own = CollectorRegistry()
    histogram = Histogram(
        "vllm:time_to_first_token_seconds", "x", ["model_name"], buckets=(1, 2), registry=own
    )
    counter = Counter("vllm:generation_tokens", "x", ["model_name"], registry=own)
    Counter("vllm:of_no_interest", "x", registry=own)
    histogram.labels("m").observe(1.5)
    counter.labels("m").inc(7)
    found = {(sample.name, sample.le): sample.value for sample in samples(own)}
    assert found["vllm:time_to_first_token_seconds_bucket", "1.0"] == 0
    assert found["vllm:time_to_first_token_seconds_bucket", "2.0"] == 1
    assert found["vllm:time_to_first_token_seconds_sum", ""] == 1.5
    assert found["vllm:generation_tokens_total", ""] == 7
    assert not any("no_interest" in name or name.endswith("_created") for name, _ in found)


def test_what_changed_is_handed_on_and_now_and_then_everything():
    now = [
        Sample("vllm:kv_cache_usage_perc", "", 0.5, "x"),
        Sample("vllm:a_bucket", "+Inf", 3, "x"),
    ]
    recorder = Recorder()
    metrics = EngineMetrics(recorder.make, lambda: now)
    metrics.flush()
    metrics.flush()
    assert recorder.calls == 2
    now[0] = now[0]._replace(value=0.25)
    metrics.flush()
    assert recorder.calls == 3
    assert recorder.values == {("vllm_kv_cache_usage_perc", ""): 0.25, ("vllm_a_bucket", "+Inf"): 3}
    for _ in range(ALL_EVERY):
        metrics.flush()
    assert recorder.calls == 5, "Ray's exporter forgets what nobody sets"


def test_every_exported_metric_has_a_text():
    assert all(name.startswith("vllm:") and text for name, text in EXPORTED.items())
