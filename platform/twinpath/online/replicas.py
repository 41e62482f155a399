"""What runs inside Serve's replicas: the ingress, and a placed node."""

import asyncio
import contextlib
import gc
import logging
import os
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any

from twinpath.errors import RetryLaterError
from twinpath.graph.columns import Columns, Outcome
from twinpath.graph.plan import Plan, Step
from twinpath.graph.runner import NodeRunner
from twinpath.graph.stage import NodeCall
from twinpath.graph.streaming import StreamingExecutor
from twinpath.nodes.features import FeatureLookup
from twinpath.nodes.llm_load import EngineLoad
from twinpath.nodes.llm_memory import is_engine
from twinpath.online.app import GraphApp, graph_app
from twinpath.online.args import GraphArgs
from twinpath.online.autoscaling import KV_USE, LOAD
from twinpath.online.batcher import Batcher
from twinpath.online.capturing import capture
from twinpath.online.engines import EngineSide, Part, Wanted
from twinpath.online.environment import slow_path
from twinpath.online.feature_args import CaptureArgs
from twinpath.online.feature_metrics import FeatureMetrics
from twinpath.online.frontend import Frontend
from twinpath.online.gateway.build import refuse_public
from twinpath.online.grpc_methods import GrpcMethods
from twinpath.online.handles import answers, remote, routes_rows, streamed
from twinpath.online.housekeeping import put_behind
from twinpath.online.metrics import GraphMetrics, replica_metrics
from twinpath.online.protocols.generate_stream import stream_routes
from twinpath.online.protocols.openai import OpenAIDoor, engine_step
from twinpath.online.protocols.openai_remote import RemoteEngine
from twinpath.online.rollouts.reporter import Reporter
from twinpath.online.rollouts.side import RolloutSide, teller
from twinpath.online.rollouts.watched import reports

#: Serve's own logger, so that it stands in the replica's log, and on the terminal of `serve run`.
_LOG = logging.getLogger("ray.serve")
#: Batches under way from one ingress when nodes behind it have replicas of their own: enough to
#: keep many of them busy, and to let the queue be seen where it scales them.
REMOTE_MAX_INFLIGHT = 64


class Ingress(GrpcMethods):
    """HTTP and gRPC in, fused nodes in this process, calls to placed nodes with the columns of
    a batch."""

    def __init__(
        self,
        plan: Plan,
        given: GraphArgs,
        handles: Mapping[str, Any],
        controller: Any = None,
    ) -> None:
        args = given.ingress
        self._controller, self._rollout_args = controller, given.rollouts
        self._side: RolloutSide | None = None
        self._plan, self._args = plan, args
        #: The engine that the whole graph is, if it is one in this process, and every engine here.
        self._engine: Any = None
        self._sides: list[EngineSide] = []
        self._handles = handles
        self._gateway, self._version = given.gateway, given.version
        self._push = given.features.push
        # A node that may rest at no replica is not waited for: a probe must not wake it.
        self._awaited = {
            step.name: handles[step.name]
            for step in plan.placed
            if step.placement is not None and step.placement.replicas.min > 0
        }
        by_row = {step.name for step in plan.placed if routes_rows(step)}
        remotes = {name: remote(handle, name in by_row, name) for name, handle in handles.items()}
        self._executor = StreamingExecutor(
            plan,
            remotes=remotes,
            streams={name: streamed(handle) for name, handle in handles.items()},
            offload_after_ms=args.offload_after_ms,
        )
        self._executor.setup()
        self._batcher = Batcher(
            self._executor.run,
            plan.placement.batch,
            max_inflight=args.max_inflight
            or max(REMOTE_MAX_INFLIGHT if remotes else 1, *_at_once(plan, remotes)),
            max_queue_rows=args.max_queue_rows,
        )
        self._recorders = capture(self._executor.nodes, given.features.capture, plan.graph_name)
        settle()
        put_behind(os.environ)

    async def __serve_build_asgi_app__(self) -> GraphApp:
        """Serve's hook for the ASGI app; called once, after the constructor."""
        options = await _http_options()
        refuse_public(options.host, self._gateway)
        slow = slow_path(os.environ, options.request_timeout_s)
        if slow is not None:
            _LOG.warning("%s: %s", self._plan.graph_name, slow)
        replica = _replica()
        if self._controller is not None:
            self._side = RolloutSide(
                self._executor.nodes, self._controller, replica, self._rollout_args
            )
            self._side.start()
        app = graph_app(
            self._plan,
            self._batcher,
            max_body_bytes=self._args.max_body_bytes,
            body_timeout_s=self._args.body_timeout_s,
            gateway=self._gateway,
            version=self._version,
            unready=self._unready,
            queue_timeout_s=self._args.queue_timeout_s,
            close=self._close,
            echo_request_id=False,
            push=self._push,
            more_routes=[
                *stream_routes(
                    self._plan,
                    self._executor,
                    self._args.max_body_bytes,
                    lambda: self._app.frontend.plane.admit(),
                ),
                *(self._side.routes() if self._side is not None else ()),
            ],
        )
        if self._side is not None:
            app.frontend.tell(self._side.feedback.remember)
        plane = app.frontend.plane
        make = replica_metrics(self._plan.graph_name)
        metrics = GraphMetrics(make, plane.statistics)
        nodes = self._executor.nodes
        metrics.also.append(FeatureMetrics(make, nodes).flush)
        app.frontend.observe = metrics.request
        plane.observe_batch = metrics.batch
        plane.switch = self._switch
        self._sides = [EngineSide(node, make) for node in nodes.values() if is_engine(node)]
        step = engine_step(self._plan)
        if step is not None and step.placement is None:
            [side], self._engine = self._sides, nodes[step.name]
            app.openai = OpenAIDoor(await side.app(), app.frontend, self._engine.check_health)
        elif step is not None:
            routed_by = getattr(step.node, "routed_by", None)
            app.openai = OpenAIDoor(RemoteEngine(self._handles[step.name], routed_by), app.frontend)
        plane.live_versions = self._live_versions
        plane.notes = self._notes
        self._app = app
        return app

    def check_health(self) -> None:
        """Serve's hook: raises what a node of this process complains of."""
        for node in self._executor.nodes.values():
            getattr(node, "check_health", lambda: None)()

    def set_loaded(self, loaded: bool) -> bool:
        """Take this replica's graph in or out of service; called on all replicas at once."""
        self._app.frontend.plane.loaded = loaded
        return loaded

    def join_feedback(
        self, request_id: bytes, labels: list[float | None], principal: str | None
    ) -> dict[str, Any] | None:
        """Labels for a request that this replica may have answered; called on all replicas."""
        return None if self._side is None else self._side.join_here(request_id, labels, principal)

    async def _switch(self, loaded: bool) -> None:
        """The same for every running replica; this one is among them."""
        from ray import serve
        from ray.serve.exceptions import DeploymentUnavailableError

        context = serve.get_replica_context()
        handle = serve.get_deployment_handle(context.deployment, context.app_name)
        for _ in range(50):  # a new handle has to learn of the replicas first
            with contextlib.suppress(DeploymentUnavailableError):
                await handle.broadcast("set_loaded", loaded).results_async(timeout_s=5)
                return
            await asyncio.sleep(0.1)
        raise RetryLaterError("no replica could be told: try again")

    def _live_versions(self) -> list[str]:
        """Versions of the registry's model in this process; of the first, if there are several."""
        for node in self._executor.nodes.values():
            if getattr(node, "pins", False):
                found: list[str] = node.versions()
                return found
        return []

    def _notes(self) -> list[str]:
        """What nodes of this process say about themselves although they answer."""
        noting = [n.notes for n in self._executor.nodes.values() if hasattr(n, "notes")]
        return [note for notes in noting for note in notes()]

    def _frontend(self) -> Frontend:
        return self._app.frontend

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Rows queued or running; read by the autoscaling policy."""
        waiting, running = self._batcher.queued_rows, self._batcher.running_rows
        if self._engine is not None:
            # Rows that run are sequences of the engine, as the OpenAI API's requests are.
            running = self._engine.sequences()
        stats = {LOAD: float(waiting + running)}
        if self._engine is not None:
            stats[KV_USE] = float(self._engine.load.kv_use)
        return stats

    async def _unready(self) -> list[str]:
        """Names of placed nodes that no replica has set up yet; asked until each has said yes."""
        for name, ready in zip(
            list(self._awaited),
            await asyncio.gather(*(answers(handle) for handle in self._awaited.values())),
            strict=True,
        ):
            if ready:
                self._awaited.pop(name, None)
        return sorted(self._awaited)

    async def _close(self) -> None:
        for side in self._sides:
            side.close()
        await self._batcher.close()
        if self._side is not None:
            await self._side.close()
        await asyncio.to_thread(self._executor.teardown)
        for recorder in self._recorders:
            await asyncio.to_thread(recorder.close)


class PlacedNode:
    """One node with replicas of its own. Concurrent calls are joined into one batch."""

    def __init__(
        self,
        step: Step,
        offload_after_ms: float,
        controller: Any = None,
        interval_s: float = 1.0,
        captured: CaptureArgs | None = None,
        graph: str = "",
    ) -> None:
        assert step.placement is not None
        self._returns = step.returns
        self._runner = NodeRunner(step, offload_after_ms)
        self._runner.setup()
        self._batcher = Batcher(
            self._runner.call,
            step.placement.batch,
            max_inflight=getattr(step.node, "max_inflight", 1),
            max_queue_rows=1 << 30,
        )
        self._recorders = capture({step.name: self._runner.node}, captured, graph)
        nodes = {step.name: self._runner.node}
        self._features: FeatureMetrics | None = None
        if isinstance(self._runner.node, FeatureLookup):
            self._features = FeatureMetrics(replica_metrics(graph), nodes)
        self._reporter: Reporter | None = None
        if controller is not None and reports(self._runner.node):
            self._reporter = Reporter(nodes, teller(controller), _replica(), interval_s)
            self._reporter.start()
        self._side: EngineSide | None = None
        if is_engine(self._runner.node):
            self._side = EngineSide(self._runner.node, replica_metrics(graph))
        settle()
        put_behind(os.environ)

    async def __call__(self, columns: Columns, left_s: float | None = None) -> Outcome:
        """n rows of the columns that the node reads → its own columns that anything reads.
        Nobody waits for them any more after ``left_s`` seconds."""
        if self._features is not None:
            self._features.soon()
        deadline_s = None if left_s is None else time.monotonic() + left_s
        outcome = await self._batcher.submit(columns, deadline_s)
        kept = outcome.columns
        if self._returns is not None:
            kept = {name: kept[name] for name in self._returns if name in kept}
        return Outcome(
            outcome.n, kept, outcome.rows, outcome.errors,
            remarks=outcome.remarks, batch_notes=outcome.notes,
        )  # fmt: skip

    async def stream(self, columns: Columns) -> AsyncIterator[Columns]:
        """One row of the columns that the node reads → its own columns as they come."""
        async with aclosing(self._runner.node.stream(columns)) as parts:
            async for part in parts:
                yield part

    def check_health(self) -> None:
        """Serve's hook: raises what the node complains of."""
        getattr(self._runner.node, "check_health", lambda: None)()

    def ready(self) -> bool:
        """Answers only once the constructor, and so the node's setup, is through."""
        return True

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Rows queued or running; read by the autoscaling policy."""
        stats = {LOAD: float(self._batcher.queued_rows + self._batcher.running_rows)}
        load = getattr(self._runner.node, "load", None)
        if isinstance(load, EngineLoad):
            # Rows that run are sequences of the engine, as those that are streamed are.
            stats[LOAD] = float(self._batcher.queued_rows + self._runner.node.sequences())
            stats[KV_USE] = float(load.kv_use)
        return stats

    async def __del__(self) -> None:
        if hasattr(self, "_batcher"):
            await self._batcher.close()
            if self._reporter is not None:
                self._reporter.stop()
            if self._side is not None:
                self._side.close()
            self._runner.teardown()
            for recorder in getattr(self, "_recorders", ()):
                await asyncio.to_thread(recorder.close)


class PlacedEngine(PlacedNode):
    """An engine with replicas of its own that also answers the OpenAI API."""

    async def __init__(self, *args: Any) -> None:  # type: ignore[misc]
        """Also makes the OpenAI app, so that a replica whose options vLLM refuses never starts."""
        super().__init__(*args)
        assert self._side is not None
        await self._side.app()

    async def openai(self, routed: Columns, wanted: Wanted) -> AsyncIterator[Part]:
        """The answer to a request to the OpenAI API; ``routed`` is the router's."""
        assert self._side is not None
        async with aclosing(self._side.answer(wanted)) as parts:
            async for part in parts:
                yield part


def _replica() -> str:
    """The id of the replica that this runs in."""
    from ray import serve

    found: str = serve.get_replica_context().replica_id.unique_id
    return found


def _at_once(plan: Plan, remotes: Mapping[str, NodeCall]) -> list[int]:
    """How many batches at once the nodes of this process are made for; 1 unless they say more."""
    steps = [step for step in plan.steps if step.node is not None and step.name not in remotes]
    return [min((getattr(step.node, "max_inflight", 1) for step in steps), default=1)]


async def _http_options() -> Any:
    """Serve's HTTPOptions."""
    from ray.serve.context import _get_global_client

    return await _get_global_client()._controller.get_http_config.remote()


def settle() -> None:
    """Leave what is loaded by now out of garbage collection, and look for cycles less often: a
    full pass over the objects of Ray, numpy and a model stops a replica for tens of milliseconds,
    and frees nothing. Requests make no cycles; reference counts free them."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
