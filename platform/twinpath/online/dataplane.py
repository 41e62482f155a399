"""The data plane: one served graph as a model, whatever protocol asks.

``ready``, ``metadata``, ``infer`` and ``stream`` (the names of the Open Inference Protocol) are all
that protocols use; they only translate. Nothing here knows HTTP, gRPC or Ray.
"""

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from twinpath.errors import (
    OverloadedError,
    TwinpathError,
    UnknownModelError,
    did_you_mean,
    error_of,
    http_status_of,
)
from twinpath.graph.columns import PIN, Columns, Outcome, row_count
from twinpath.graph.dtypes import ColumnType
from twinpath.graph.plan import Plan
from twinpath.online.batcher import Batcher, Done, Timing
from twinpath.online.policy import Priority
from twinpath.online.statistics import Statistics


@dataclass(slots=True)
class Ask:
    """What is known of a request beside its rows; the gateway's rules read it and fill it in.

    ``headers`` are by lower-case name: HTTP's, or gRPC's metadata. ``deadline_s`` is on
    ``time.monotonic``'s clock.
    """

    graph: str
    headers: Mapping[bytes, bytes]
    transport: str = "http"
    peer: str = ""
    path: str = ""
    body_bytes: int = 0
    rows: int = 0
    request_id: bytes = b""
    principal: str | None = None
    #: Graphs, and rights beside them, that the caller's credentials give.
    scopes: frozenset[str] = frozenset()
    #: Whether the caller may use the admin API: only one who was authenticated can.
    admin: bool = False
    deadline_s: float | None = None
    priority: Priority = Priority.NORMAL
    #: No request may have a higher one, whatever it asks for.
    max_priority: Priority = Priority.HIGH
    #: The version of the model that the request asks for, in any protocol.
    version: str | None = None
    #: The limit that the caller is nearest to, how many requests remain, and for how many seconds.
    standing: tuple[Any, int, float] | None = None
    started_s: float = field(default_factory=time.monotonic)
    timing: Timing | None = None


@dataclass(frozen=True, slots=True)
class Metadata:
    """What clients may know of the model: columns in and out, by name."""

    name: str
    versions: tuple[str, ...]
    inputs: Mapping[str, ColumnType]
    outputs: Mapping[str, ColumnType]
    #: Inputs that may be left out.
    optional: frozenset[str]


class DataPlane:
    """One graph behind every protocol.

    ``unready`` gives the names of nodes in other processes that are not set up yet. Rows that
    wait longer than ``queue_timeout_s`` are given up with DeadlineError.
    """

    def __init__(
        self,
        plan: Plan,
        batcher: Batcher,
        *,
        version: str = "1",
        unready: Callable[[], Awaitable[list[str]]] | None = None,
        queue_timeout_s: float = 60.0,
    ) -> None:
        self.plan = plan
        self._batcher = batcher
        self._unready = unready
        self._queue_timeout_s = queue_timeout_s
        self.statistics = Statistics()
        batcher.watch = self._batch_ran
        #: Told of every batch, for metrics.
        self.observe_batch: Callable[[Timing], None] | None = None
        #: False while the model is taken out of service.
        self.loaded = True
        #: Tells all replicas, this one included, to take the model in or out of service.
        self.switch: Callable[[bool], Awaitable[None]] = self._switch
        #: Whether requests may ask for a version of a registry's model.
        self.pinnable = plan.pinnable
        #: Versions of the model that are live, for graphs that have more than the one; best first.
        self.live_versions: Callable[[], Sequence[str]] = tuple
        #: What readiness says beside that it is ready.
        self.notes: Callable[[], list[str]] = list
        self._fixed = Metadata(
            plan.graph_name,
            (version,),
            plan.input_schema.fields,
            plan.output_schema.fields,
            frozenset(plan.input_schema.defaults()),
        )

    @property
    def metadata(self) -> Metadata:
        """What clients may know of the model."""
        live = tuple(self.live_versions())
        return replace(self._fixed, versions=live) if live else self._fixed

    @property
    def name(self) -> str:
        """The graph's name, which is the model's."""
        return self._fixed.name

    @property
    def version(self) -> str:
        """The version that is served."""
        live = self.live_versions()
        return live[0] if live else self._fixed.versions[-1]

    def find(self, name: str, version: str | None = None) -> "DataPlane":
        """This model, if it is the one that is meant. Raises UnknownModelError. Whether a version
        of a registry's model is live is known to its node, which each request asks."""
        if name != self.name:
            raise UnknownModelError(f"no model {name!r} here.{did_you_mean(name, [self.name])}")
        if version and self.pinnable and version.isdigit():
            return self
        if version and version not in self.metadata.versions:
            known = ", ".join(self.metadata.versions)
            raise UnknownModelError(f"model {name!r} has no version {version!r}; it has: {known}")
        return self

    async def ready(self) -> list[str]:
        """What is not ready yet, in words; empty when rows can be run."""
        if not self.loaded:
            return [f"model {self.name!r} is unloaded"]
        return await self._unready() if self._unready is not None else []

    def checked(self, columns: Columns) -> Columns:
        """Columns that fit the graph's input. Raises InputError that names the first column or
        row that does not."""
        outcome = self.plan.input_schema.from_columns(columns)
        return whole(outcome)

    def start(self, columns: Columns, ask: Ask, done: Done) -> int:
        """Run checked rows; ``done`` gets their outcome. See `Batcher.enqueue`."""
        self.admit()
        columns = self._pinned(columns, ask)
        return self._batcher.enqueue(columns, done, self._deadline_s(ask), ask.priority)

    async def infer(self, columns: Columns, ask: Ask) -> Outcome:
        """The outcome of checked rows; ``ask.timing`` says afterwards how it came about."""
        self.admit()
        outcome, ask.timing = await self._batcher.timed(
            self._pinned(columns, ask), self._deadline_s(ask), ask.priority
        )
        return outcome

    async def stream(self, columns: Columns, ask: Ask) -> AsyncIterator[Outcome]:
        """Outcomes as they come; a graph without streaming nodes gives one."""
        yield await self.infer(columns, ask)

    def give_up(self, ticket: int) -> None:
        """Forget rows that were started."""
        self._batcher.give_up(ticket)

    async def _switch(self, loaded: bool) -> None:
        self.loaded = loaded

    def _batch_ran(self, requests: int, timing: Timing) -> None:
        self.statistics.batch(timing)
        if self.observe_batch is not None:
            self.observe_batch(timing)

    def admit(self) -> None:
        """Raises OverloadedError while the model is unloaded."""
        if not self.loaded:
            raise OverloadedError(f"model {self.name!r} is unloaded: load it first", 5.0)

    def _pinned(self, columns: Columns, ask: Ask) -> Columns:
        """The columns, and beside them the version that they ask for."""
        if ask.version is None:
            return columns
        return columns | {PIN: np.full(row_count(columns), ask.version, object)}

    def _deadline_s(self, ask: Ask) -> float:
        limit_s = time.monotonic() + self._queue_timeout_s
        return limit_s if ask.deadline_s is None else min(limit_s, ask.deadline_s)


def whole(outcome: Outcome) -> Columns:
    """The columns of an outcome in which every row succeeded. Raises the first row's error, for
    protocols in which a request succeeds or fails as one."""
    if outcome.errors:
        raise rows_error(outcome)
    return outcome.columns


def rows_error(outcome: Outcome) -> TwinpathError:
    """The failed rows of an outcome as one error, of the kind that weighs most (a row that a
    client can mend weighs less than one that the server could not compute)."""
    first = min(outcome.errors)
    error = outcome.errors[first]
    text = f"{len(outcome.errors)} of {outcome.n} rows failed; first, row {first}: {error.message}"
    worst = max(outcome.errors.values(), key=lambda e: http_status_of(e.code))
    return error_of(worst.code, text)
