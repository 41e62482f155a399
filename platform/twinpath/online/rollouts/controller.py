"""The controller of an app's rollouts: one replica, which Serve starts anew wherever it dies.

It holds nothing that matters: the registry has the state, replicas have what they counted and send
it again. While there is no controller, replicas follow the registry by themselves and no rollout
moves.
"""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from twinpath.errors import InputError, TwinpathError, UnknownModelError, did_you_mean
from twinpath.online.metrics import ray_metrics
from twinpath.online.rollouts.args import RolloutArgs
from twinpath.online.rollouts.desk import Desk
from twinpath.online.rollouts.director import Director
from twinpath.online.rollouts.measures import RolloutMetrics
from twinpath.online.rollouts.operations import READS, Operations
from twinpath.online.rollouts.watched import WatchedNode
from twinpath.rollout.sketch import Report

_LOG = logging.getLogger(__name__)
#: A replica that has said nothing for so long is no longer told of.
FORGET_S = 15.0


class RolloutController:
    """Serve deployment. Replicas call :meth:`report`, the admin API :meth:`ask`."""

    def __init__(self, graph: str, nodes: Sequence[WatchedNode], args: RolloutArgs) -> None:
        from ray import serve

        from twinpath.registry.client import Registry

        self._graph, self._args = graph, args
        self._nodes = {node.node: node for node in nodes}
        self._registries = {uri: Registry(uri) for uri in {node.tracking_uri for node in nodes}}
        self._desks = {
            uri: Desk(registry, require=args.require, audit_log=args.audit_log)
            for uri, registry in self._registries.items()
        }
        self._directors = {
            node.model: Director(self._desks[node.tracking_uri], node.model) for node in nodes
        }
        self._seen: dict[tuple[str, str], tuple[float, dict[str, Any]]] = {}
        #: Counts changes of each model: those that webhooks told of, and the rollout's. Another
        #: controller begins elsewhere, so that replicas see a change then, too.
        self._changes = dict.fromkeys(self._directors, time.time_ns())
        self._metrics = RolloutMetrics(
            ray_metrics(application=serve.get_replica_context().app_name, graph=graph)
        )
        self._ticked_s = time.monotonic()
        self._lock = asyncio.Lock()
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def report(
        self, replica: str, node: str, status: dict[str, Any], report: str, labels: list[Any]
    ) -> int:
        """A replica tells of one node: its status, what it counted since its last report (JSON of
        `rollout.sketch.Report`), and labels that came, as ``[versions, scores, labels]``. It is
        told a number, which is another one once the model has changed in the registry."""
        known = self._nodes.get(node)
        if known is None:
            return 0
        if status:
            self._seen[replica, node] = (time.monotonic(), status)
        director = self._directors[known.model]
        if report:
            try:
                director.report(Report.from_json(report))
            except InputError as error:
                _LOG.warning("replica %s: %s", replica, error)
        for versions, scores, given in labels:
            director.label(versions, scores, given)
        return self._changes[known.model]

    async def ask(self, operation: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """An operation of the admin API; see `operations`. An error of ours comes back as
        ``{"error": {"code", "message"}}``, since it has to cross processes."""
        try:
            model = arguments.get("model")
            if model is None:
                return await self._overview(operation)
            if operation == "changed":
                return self._changed(model)
            if model not in self._directors:
                raise UnknownModelError(
                    f"graph {self._graph!r} serves no registered model {model!r}."
                    f"{did_you_mean(str(model), self._directors)}"
                )
            async with self._lock:
                done = await asyncio.to_thread(
                    Operations(self._directors[model].desk).run, operation, arguments
                )
                self._changes[model] += operation not in READS
            return done | self._live(model)
        except TwinpathError as error:
            return {"error": {"code": error.code, "message": error.message}}

    def ready(self) -> bool:
        """Whether the constructor is through."""
        return True

    async def check_health(self) -> None:
        """Serve's hook. Raises when the loop has ended, so that Serve starts another."""
        if self._task.done():
            raise TwinpathError("the controller's loop has ended")

    async def _overview(self, operation: str) -> dict[str, Any]:
        if operation not in ("models", "rollouts"):
            raise InputError(f"operation {operation!r} needs a model")
        return {
            "graph": self._graph,
            operation: [self._live(model) for model in self._directors],
        }

    def _changed(self, model: str) -> dict[str, Any]:
        """A webhook told of a model, which may be another graph's."""
        if model not in self._changes:
            return {"changed": None}
        self._changes[model] += 1
        return {"changed": model}

    def _live(self, model: str) -> dict[str, Any]:
        """What is known of a model here, and of the replicas that serve it."""
        now_s = time.monotonic()
        self._seen = {k: v for k, v in self._seen.items() if now_s - v[0] < FORGET_S}
        names = {node.node for node in self._nodes.values() if node.model == model}
        replicas = [
            {"replica": replica, "node": node, "age_s": round(now_s - at_s, 2)} | status
            for (replica, node), (at_s, status) in sorted(self._seen.items())
            if node in names
        ]
        return {"live": self._directors[model].status(), "replicas": replicas, "model": model}

    async def _run(self) -> None:
        while True:
            for model, director in self._directors.items():
                try:
                    async with self._lock:
                        before = director.state
                        await asyncio.to_thread(director.tick)
                        self._changes[model] += director.state != before
                    self._metrics.tell(model, director, self._statuses(model))
                except Exception:
                    _LOG.exception("the rollout of %s: trying again", model)
            await asyncio.sleep(self._args.interval_s)

    def _statuses(self, model: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._live(model)["replicas"]
        return found

    async def __del__(self) -> None:
        task = getattr(self, "_task", None)
        if task is not None:
            task.cancel()
            for registry in self._registries.values():
                registry.close()
