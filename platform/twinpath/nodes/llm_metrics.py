"""What a vLLM engine measures of itself, read from its own Prometheus metrics in this process."""

from collections.abc import Iterator
from typing import Any, NamedTuple

#: vLLM's metric → what it says. Histograms have buckets; counters end in ``_total`` when read.
EXPORTED = {
    "vllm:time_to_first_token_seconds": "Time from a request to its first token.",
    "vllm:inter_token_latency_seconds": "Time between two tokens of a sequence.",
    "vllm:e2e_request_latency_seconds": "Time from a request to its last token.",
    "vllm:request_queue_time_seconds": "Time that a sequence waited in the engine.",
    "vllm:num_requests_running": "Sequences in the engine's batch.",
    "vllm:num_requests_waiting": "Sequences that wait for it.",
    "vllm:kv_cache_usage_perc": "Part of the KV cache that is in use, 0 to 1.",
    "vllm:prefix_cache_queries": "Prompt tokens looked for in the prefix cache.",
    "vllm:prefix_cache_hits": "Prompt tokens found there.",
    "vllm:prompt_tokens": "Tokens read.",
    "vllm:generation_tokens": "Tokens written.",
    "vllm:num_preemptions": "Sequences that lost their place in the KV cache.",
}
_SERIES = [name + part for name in EXPORTED for part in ("", "_bucket", "_sum", "_count", "_total")]


class Sample(NamedTuple):
    """One value: the series' name, ``le`` of a bucket or "", the value, and what it says."""

    name: str
    le: str
    value: float
    text: str


def samples(registry: Any = None) -> Iterator[Sample]:
    """The engine's values now, from prometheus_client's registry of the process unless another is
    given; a process has one engine that is looked at."""
    from prometheus_client import REGISTRY

    whole = REGISTRY if registry is None else registry
    # vLLM has five times as many, and the loop that reads them has tokens to send.
    for metric in whole.restricted_registry(_SERIES).collect():
        text = EXPORTED[metric.name]
        for sample in metric.samples:
            yield Sample(sample.name, sample.labels.get("le", ""), float(sample.value), text)
