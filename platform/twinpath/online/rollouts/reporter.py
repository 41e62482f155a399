"""A replica's part: it tells the controller what its registry models counted, once a second.

Nothing here is in the way of a request. What could not be told is told the next time, added up.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from twinpath.errors import InputError
from twinpath.online.rollouts.feedback import Labelled
from twinpath.online.rollouts.watched import reports
from twinpath.rollout.sketch import Report

_LOG = logging.getLogger(__name__)
#: How long the controller may take to answer.
ANSWER_S = 5.0

#: ``(replica, node, status, report, labels)`` → a number that changes with the registry's model.
Tell = Callable[[str, str, dict[str, Any], str, list[Any]], Awaitable[Any]]


class Reporter:
    """Reports the registry models among ``nodes`` (by name) of one replica."""

    def __init__(
        self, nodes: Mapping[str, Any], tell: Tell, replica: str, interval_s: float = 1.0
    ) -> None:
        self._nodes = {name: node for name, node in nodes.items() if reports(node)}
        self._tell, self._replica, self._interval_s = tell, replica, interval_s
        self._reports: dict[str, Report] = {}
        self._labels: dict[str, list[Labelled]] = {}
        self._changes: dict[str, Any] = {}
        self._waiting = 0
        self._away = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Report until :meth:`stop`; from within the event loop."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    def stop(self) -> None:
        """Report no more."""
        if self._task is not None:
            self._task.cancel()
            self._task = None

    @property
    def waiting_labels(self) -> int:
        """Labels that no controller has taken yet."""
        return self._waiting

    def label(self, rows: Labelled) -> None:
        """Labels for the next report."""
        self._waiting += len(rows.labels)
        self._labels.setdefault(rows.node, []).append(rows)

    async def once(self) -> None:
        """Report every node now. A controller that does not answer is said in the log, once."""
        for name, node in self._nodes.items():
            await self._collect(name, node)
        # Labels belong to the node that scored, which may have its replicas elsewhere.
        for name in dict.fromkeys([*self._nodes, *self._labels]):
            report, labels = self._reports.pop(name, None), self._labels.pop(name, [])
            status = self._nodes[name].status() if name in self._nodes else {}
            try:
                change = await asyncio.wait_for(
                    self._tell(
                        self._replica, name, status,
                        "" if report is None else report.to_json(),
                        [[one.versions, one.scores, one.labels] for one in labels],
                    ),
                    ANSWER_S,
                )  # fmt: skip
            except Exception as error:
                if not self._away:
                    _LOG.warning("no controller of rollouts: %r", error)
                self._away = True
                self._keep(name, report, labels)
            else:
                self._away = False
                self._waiting -= sum(len(one.labels) for one in labels)
                self._changed(name, change)

    def _changed(self, name: str, change: Any) -> None:
        """Let the node ask its registry, if the controller has heard that something changed."""
        if name in self._nodes and self._changes.setdefault(name, change) != change:
            self._changes[name] = change
            self._nodes[name].ask_now()

    async def _collect(self, name: str, node: Any) -> None:
        """Add what was counted since to what could not be told."""
        counted: Report = await asyncio.to_thread(node.drain_reports)
        if not counted.versions:
            return
        try:
            kept = self._reports.setdefault(name, Report(counted.bins))
            kept.add(counted)
        except InputError:  # a rollout with other bins has begun
            self._reports[name] = counted

    def _keep(self, name: str, report: Report | None, labels: list[Labelled]) -> None:
        if report is not None:
            self._reports[name] = report
        self._labels[name] = labels + self._labels.get(name, [])

    async def _run(self) -> None:
        while True:
            try:
                await self.once()
            except Exception:
                _LOG.exception("a report was left out")
            await asyncio.sleep(self._interval_s)
