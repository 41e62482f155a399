"""A graph as a Ray Serve application builder: ``serve run graphs.flights:app``.

Annotations must be real objects here: Serve reads the builder's one, and gives it a plain dict
when it is a string, so this module has no ``from __future__ import annotations``.
"""

from collections.abc import Callable
from typing import Any

from twinpath.errors import MissingExtraError
from twinpath.graph.graph import Graph
from twinpath.graph.plan import Plan, Step
from twinpath.graph.streaming import streaming_steps
from twinpath.nodes.llm_memory import is_engine, plan_node
from twinpath.online.args import GraphArgs, args_model, place

#: Which replica of an engine a row goes to, unless the node's ``router`` names another class.
PREFIX_ROUTER = "twinpath.online.prefix_router:PrefixRouter"

#: For how long a replica that has to go may finish what it streams, unless the serve config's
#: ``deployments`` say otherwise. A replica without any request goes at once.
STREAMS_END_S = 120.0

#: Name of the deployment that controls the rollouts of an app.
CONTROLLER = "rollout-controller"


def build_app_function(graph: Graph) -> Callable[[Any], Any]:
    """The builder function of a graph. Its one parameter is a pydantic model, so ``args`` of a
    serve config are validated and unknown keys refused.

    Only functions get ``args``, in ``serve run`` and ``serve deploy``; ``serve build`` takes no
    function, but the application that it returns: ``built = app({})``.
    """
    model = args_model(graph.plan)

    def app(args: Any = None) -> Any:
        checked = args if isinstance(args, model) else model.model_validate(args or {})
        return build_application(place(graph.plan, checked), checked)

    app.__annotations__ = {"args": model, "return": Any}
    app.__doc__ = f"Serve application of graph {graph.name!r}."
    return app


def build_application(plan: Plan, args: GraphArgs) -> Any:
    """One deployment for each placed node, and the ingress that runs all the others."""
    try:
        from ray import serve
    except ImportError:
        raise MissingExtraError("ray[serve]", "online") from None

    _check_memory(plan)
    from twinpath.online.autoscaling import serve_scaling
    from twinpath.online.protocols.openai import engine_step
    from twinpath.online.replicas import Ingress, PlacedEngine, PlacedNode

    door = engine_step(plan)
    controller = _controller(plan, args)
    handles = {}
    for step in plan.placed:
        placement = step.placement
        assert placement is not None
        kind = PlacedEngine if step is door else PlacedNode
        deployment = serve.deployment(kind).options(
            name=step.name,
            max_ongoing_requests=1024,
            ray_actor_options=placement.ray_actor_options(),
            **_health(step.node),
            **_patience(callable(getattr(step.node, "stream", None))),
            **_routing(step),
            **serve_scaling(placement.replicas),
        )
        handles[step.name] = deployment.bind(
            step,
            args.ingress.offload_after_ms,
            controller,
            args.rollouts.interval_s,
            args.features.capture,
            plan.graph_name,
        )
    ingress = serve.deployment(serve.ingress()(Ingress)).options(
        name=plan.graph_name,
        max_ongoing_requests=4096,
        logging_config={"enable_access_log": False},
        ray_actor_options=plan.placement.ray_actor_options(),
        **_health(*(step.node for step in plan.steps if step.placement is None)),
        **_patience(door is not None or streaming_steps(plan) is not None),
        **serve_scaling(plan.placement.replicas),
    )
    return ingress.bind(plan, args, handles, controller)


def _check_memory(plan: Plan) -> None:
    """Raises MemoryPlanError for an engine that cannot fit, with the numbers, and ConfigError for
    one that wants more GPUs than its replicas have."""
    for step in plan.steps:
        if is_engine(step.node):
            found = plan_node(step.node, num_gpus=(step.placement or plan.placement).num_gpus)
            if found is not None:
                found.check()


def _health(*nodes: Any) -> dict[str, Any]:
    """A node that can tell whether it is well is asked often."""
    if any(hasattr(node, "check_health") for node in nodes):
        return {"health_check_period_s": 2.0}
    return {}


def _patience(streams: bool) -> dict[str, Any]:
    """Streams outlast the 20 seconds that Serve waits for answers when a replica has to go."""
    return {"graceful_shutdown_timeout_s": STREAMS_END_S} if streams else {}


def _routing(step: Step) -> dict[str, Any]:
    """Engines get the router that knows which replica has seen a prompt's beginning."""
    from twinpath.online.handles import routes_rows

    if not routes_rows(step):
        return {}
    from ray.serve.config import RequestRouterConfig

    config = RequestRouterConfig(
        request_router_class=getattr(step.node, "router", PREFIX_ROUTER),
        request_router_kwargs=dict(step.node.routed_by),
    )
    return {"request_router_config": config}


def _controller(plan: Plan, args: GraphArgs) -> Any:
    """The controller of rollouts, for graphs that have registry models; else None."""
    from twinpath.online.rollouts.watched import watched_nodes

    nodes = watched_nodes(plan)
    if not nodes:
        return None
    from ray import serve

    from twinpath.online.rollouts.controller import RolloutController

    deployment = serve.deployment(RolloutController).options(
        name=CONTROLLER,
        num_replicas=1,
        max_ongoing_requests=256,
        ray_actor_options={"num_cpus": 0},
        # It does nothing that a client waits for, and a rollout stands still without it.
        health_check_period_s=2.0,
        health_check_timeout_s=20.0,
        graceful_shutdown_timeout_s=2.0,
        logging_config={"enable_access_log": False},
    )
    return deployment.bind(plan.graph_name, nodes, args.rollouts)
