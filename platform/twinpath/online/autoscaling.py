"""Replicas on queue depth: a Serve autoscaling policy on rows that wait or run.

Every replica reports the rows in its batcher (``record_autoscaling_stats``); calls that wait at
handles for a replica are added. Serve's own count misses what waits inside a replica. Replicas
that hold an engine also report how full its KV cache is: long sequences fill it while the queue is
short.
"""

import math
from typing import Any

from twinpath.graph.placement import Replicas

#: Name of the figure that replicas report: rows queued or running in their batcher.
LOAD = "rows_in_replica"
#: The same of engines: the part of the KV cache that running sequences hold, 0 to 1.
KV_USE = "kv_cache_use"
#: How full the caches should be on average. Sequences that find no block are preempted and computed
#: again, so some of it is left.
TARGET_KV_USE = 0.85


def desired_replicas(
    load_rows: float, target_queue: float, low: int, high: int, kv_use: float = 0.0
) -> int:
    """As many replicas as give each ``target_queue`` rows, within the bounds; at no load, low.

    ``kv_use`` is the sum over replicas with engines; where that asks for more replicas, it wins.
    """
    wanted = max(math.ceil(load_rows / target_queue), math.ceil(kv_use / TARGET_KV_USE))
    return max(low, min(high, wanted))


def queue_depth_policy(ctx: Any) -> tuple[int, dict[str, Any]]:
    """Serve's policy interface: AutoscalingContext → (replicas, state).

    It takes the context only: Serve gives ``policy_kwargs`` to classes, never to functions, and
    a policy that raises stops the controller for every application.
    """
    reported = (ctx.aggregated_metrics or {}).get(LOAD) or {}
    load = sum(reported.values()) + (ctx.total_queued_requests or 0.0)
    caches = (ctx.aggregated_metrics or {}).get(KV_USE) or {}
    wanted = desired_replicas(
        load,
        ctx.config.get_target_ongoing_requests(),
        ctx.capacity_adjusted_min_replicas,
        ctx.capacity_adjusted_max_replicas,
        sum(caches.values()),
    )
    return wanted, ctx.policy_state or {}


def serve_scaling(replicas: Replicas) -> dict[str, Any]:
    """Deployment options for ``Replicas``: ``num_replicas`` or ``autoscaling_config``."""
    if replicas.fixed and replicas.min > 0:
        return {"num_replicas": replicas.min}
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

    config = AutoscalingConfig(
        min_replicas=replicas.min,
        max_replicas=replicas.max,
        target_ongoing_requests=replicas.target_queue,
        metrics_interval_s=0.5,
        look_back_period_s=2.0,
        upscale_delay_s=replicas.upscale_delay_s,
        downscale_delay_s=replicas.downscale_delay_s,
        policy=AutoscalingPolicy(policy_function="twinpath.online.autoscaling:queue_depth_policy"),
    )
    return {"autoscaling_config": config}
