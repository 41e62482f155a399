"""Serve's own account of requests that Serve did not see: how many run, and its request metrics.

It reads private names of Serve's replica; `fastpath` checks that they are there.
"""

import asyncio
import random
from collections import defaultdict
from typing import Any

FLUSH_S = 0.1
#: Latencies that are observed of each route and status in one flush.
SAMPLE = 20


class ServeMetrics:
    """What Serve's wrapper would have recorded, for one ingress replica.

    The count of ongoing requests, on which draining and load depend, is exact at every moment;
    counters are handed over ten times a second, and so are latencies, of which no more than
    `SAMPLE` at a time (taken at random, so that their distribution stays): the agent of Ray's
    dashboard takes a core for some thousand of them a second.
    """

    def __init__(self, replica: Any, protocol: str = "HTTP", method: str = "POST") -> None:
        from ray.serve._private.common import RequestMetadata, RequestProtocol

        self._manager = replica._metrics_manager
        self._application = replica._deployment_id.app_name
        self._deployment = replica._deployment_id.name
        self._protocol, self._method = RequestProtocol[protocol], method
        self._metadata = RequestMetadata(
            request_id="", internal_request_id="", is_direct_ingress=True,
            _request_protocol=self._protocol,
        )  # fmt: skip
        self._latencies_ms: dict[tuple[str, str, bool, bool], list[float]] = defaultdict(list)
        self._due = False

    def began(self) -> None:
        """A request runs from now on."""
        self._manager.inc_num_ongoing_requests(self._metadata)

    def ended(
        self, route: str, status: str, latency_ms: float, *, refused: bool, failed: bool
    ) -> None:
        """It was answered: ``refused`` if not with what it wanted, ``failed`` if that is the
        server's fault."""
        self._manager.dec_num_ongoing_requests(self._metadata)
        self._latencies_ms[route, status, refused, failed].append(latency_ms)
        if not self._due:
            self._due = True
            asyncio.get_running_loop().call_later(FLUSH_S, self.flush)

    def flush(self) -> None:
        """Hand everything to Serve's metrics."""
        self._due = False
        seen, self._latencies_ms = self._latencies_ms, defaultdict(list)
        manager = self._manager
        for (route, status, refused, failed), latencies_ms in seen.items():
            for latency_ms in latencies_ms:
                manager._user_code_time_accumulator.add(latency_ms)
            manager._max_processing_latency_trackers[route].add(max(latencies_ms))
            _observe(manager._processing_latency_tracker, latencies_ms, {"route": route})
            if failed:
                tags = {"route": route, "exception_type": status}
                manager._error_counter.inc(len(latencies_ms), tags=tags)
            else:
                manager._request_counter.inc(len(latencies_ms), tags={"route": route})
            if manager._should_emit_request_ingress_metrics(self._protocol):
                self._ingress(route, status, refused, latencies_ms)

    def _ingress(self, route: str, status: str, refused: bool, latencies_ms: list[float]) -> None:
        ingress = self._manager._ingress_metrics[self._protocol]
        given = {
            "route": route,
            "method": self._method,
            "application": self._application,
            "status_code": status,
        }
        tags = ingress.request_tags(**given)
        ingress.request_counter.inc(len(latencies_ms), tags=tags)
        _observe(ingress.processing_latency_tracker, latencies_ms, tags)
        if refused:
            tags = ingress.request_error_tags(**given)
            ingress.request_error_counter.inc(len(latencies_ms), tags=tags)
            tags = ingress.deployment_error_tags(**given, deployment=self._deployment)
            ingress.deployment_request_error_counter.inc(len(latencies_ms), tags=tags)


def _observe(histogram: Any, values: list[float], tags: dict[str, str]) -> None:
    for value in random.sample(values, min(SAMPLE, len(values))):
        histogram.observe(value, tags=tags)
