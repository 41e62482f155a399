"""A graph in service and out of it: the repository API's ``load`` and ``unload``, on every replica.

A node may have ``async rest(resting)``: called with True once its graph is out of service, it
gives back what it can; called with False, it is ready again before the graph is back. An engine
with sleep mode sleeps.
"""

import asyncio
from collections.abc import Mapping
from typing import Any

from twinpath.errors import TwinpathError
from twinpath.graph.plan import Plan

#: What a node has for its rest, or its waking: an engine ends what it has begun, and moves its
#: weights.
REST_S = 120.0


async def rest(node: object, resting: bool) -> None:
    """Let a node of this process rest, or wake it, if it can."""
    call = getattr(node, "rest", None)
    if call is not None:
        await call(resting)


async def switch(plan: Plan, handles: Mapping[str, Any], loaded: bool) -> None:
    """Call ``set_loaded`` on all replicas of the ingress that this runs in, and of placed nodes
    that can rest. The ingress is the first out of service and the last back in. Raises
    TwinpathError when no replica heard."""
    from ray import serve

    context = serve.get_replica_context()
    ingress = serve.get_deployment_handle(context.deployment, context.app_name)
    told = [(ingress, True)]
    for step in plan.placed:
        if step.placement is not None and hasattr(step.node, "rest"):
            # One that may have no replica may have nobody to tell.
            told.append((handles[step.name], step.placement.replicas.min > 0))
    for handle, somebody in reversed(told) if loaded else told:
        await _tell(handle, loaded, somebody)


async def _tell(handle: Any, loaded: bool, somebody: bool) -> None:
    for _ in range(50 if somebody else 1):  # a new handle has to learn of the replicas first
        if await handle.broadcast("set_loaded", loaded).results_async(timeout_s=REST_S):
            return
        await asyncio.sleep(0.1)
    if somebody:
        raise TwinpathError("no replica could be told: try again")
