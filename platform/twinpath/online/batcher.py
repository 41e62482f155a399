"""The batcher: a bounded, cancel-safe queue around the batching policy, on one event loop."""

import asyncio
import contextvars
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

from twinpath.errors import (
    ClientClosedError,
    DeadlineError,
    NodeContractError,
    OverloadedError,
    TwinpathError,
)
from twinpath.graph.columns import Columns, Outcome, concat, row_count
from twinpath.graph.placement import Batch
from twinpath.online.policy import BatchPolicy, Dispatch, WakeAt

_LOG = logging.getLogger(__name__)
_Shape = tuple[tuple[str, str, tuple[int, ...]], ...]


@dataclass(slots=True, eq=False)
class _Request:
    columns: Columns
    rows: int
    deadline_s: float | None
    future: "asyncio.Future[Outcome]"
    abandoned: Callable[[], bool] | None = None


class Batcher:
    """Joins concurrent ``submit`` calls into batches for ``run``.

    ``run`` gets the columns of a whole batch and returns one outcome for it. At most
    ``max_inflight`` batches run at a time, and at most ``max_queue_rows`` rows wait; a request
    that finds the queue empty is always taken, however large.
    """

    def __init__(
        self,
        run: Callable[[Columns], Awaitable[Outcome]],
        batch: Batch,
        *,
        max_inflight: int = 1,
        max_queue_rows: int = 4096,
    ) -> None:
        self._run = run
        self._policy = BatchPolicy(batch, max_inflight)
        self._max_queue_rows = max_queue_rows
        self._requests: dict[int, _Request] = {}
        self._tickets = itertools.count()
        self._running_rows = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._flush_due = False
        self._wake: asyncio.TimerHandle | None = None
        self._average_s = 0.05
        #: A batch belongs to no caller: run in the context of the one that happened to come
        #: first, its calls would be cancelled with that one's request, and its mates with them.
        self._context = contextvars.copy_context()

    @property
    def queued_rows(self) -> int:
        """Rows that wait."""
        return self._policy.queued_rows

    @property
    def running_rows(self) -> int:
        """Rows in batches under way."""
        return self._running_rows

    async def submit(
        self,
        columns: Columns,
        deadline_s: float | None = None,
        abandoned: Callable[[], bool] | None = None,
    ) -> Outcome:
        """The outcome of these rows. ``deadline_s`` is on ``time.monotonic``'s clock;
        ``abandoned`` is asked before the rows are run, whether anybody still wants them.

        Raises OverloadedError at once when the queue is full, DeadlineError as soon as the
        deadline passes while the rows wait, ClientClosedError when they are abandoned (in both
        cases they are never run), and whatever ``run`` raises.
        """
        rows = row_count(columns)
        waiting = self._policy.queued_rows
        if waiting and waiting + rows > self._max_queue_rows:
            retry_after_s = max(1.0, round(self._average_s * len(self._requests), 1))
            raise OverloadedError(
                f"{waiting} rows wait and the limit is {self._max_queue_rows}: try again in "
                f"{retry_after_s:g} s",
                retry_after_s,
            )
        loop = asyncio.get_running_loop()
        ticket = next(self._tickets)
        request = _Request(columns, rows, deadline_s, loop.create_future(), abandoned)
        self._requests[ticket] = request
        self._policy.arrived(ticket, rows, time.monotonic())
        self._flush_soon(loop)
        # An event loop's clock and time.monotonic are the same one.
        expiry = None if deadline_s is None else loop.call_at(deadline_s, self._expire, ticket)
        try:
            return await request.future
        finally:
            if expiry is not None:
                expiry.cancel()
            if self._requests.pop(ticket, None) is not None:
                self._policy.dropped(ticket)

    async def close(self) -> None:
        """Wait until everything accepted has been answered."""
        while self._requests or self._tasks:
            waiting: list[asyncio.Future[Any]] = [*self._tasks]
            waiting += [request.future for request in self._requests.values()]
            await asyncio.wait(waiting)

    def _flush_soon(self, loop: asyncio.AbstractEventLoop) -> None:
        """Flush behind all callbacks of this loop iteration, so that requests which were read
        from their sockets together travel together."""
        if not self._flush_due:
            self._flush_due = True
            loop.call_soon(self._flush, context=self._context)

    def _flush(self) -> None:
        self._flush_due = False
        if self._wake is not None:
            self._wake.cancel()
            self._wake = None
        loop = asyncio.get_running_loop()
        while (instruction := self._policy.decide(time.monotonic())) is not None:
            if isinstance(instruction, WakeAt):
                delay_s = max(0.0, instruction.time_s - time.monotonic())
                self._wake = loop.call_later(delay_s, self._flush, context=self._context)
                return
            task = loop.create_task(self._dispatch(instruction), context=self._context.copy())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _dispatch(self, instruction: Dispatch) -> None:
        requests = self._take(instruction.tickets)
        rows = sum(request.rows for request in requests)
        self._running_rows += rows
        started = time.monotonic()
        try:
            for group in _compatible(requests):
                await self._answer(group)
        finally:
            for request in requests:  # only if this task itself was cancelled is any left
                request.future.cancel()
            self._running_rows -= rows
            self._average_s += 0.2 * (time.monotonic() - started - self._average_s)
            self._policy.finished()
            self._flush_soon(asyncio.get_running_loop())

    def _take(self, tickets: Iterable[int]) -> list[_Request]:
        """The requests that are still wanted; the others are answered here."""
        now_s = time.monotonic()
        wanted = []
        for ticket in tickets:
            request = self._requests.pop(ticket, None)
            if request is None or request.future.done():
                continue
            if request.deadline_s is not None and now_s >= request.deadline_s:
                request.future.set_exception(_expired())
                continue
            if request.abandoned is not None and request.abandoned():
                request.future.set_exception(ClientClosedError("the client hung up"))
                continue
            wanted.append(request)
        return wanted

    def _expire(self, ticket: int) -> None:
        """The deadline of a request has come: if it still waits, it is answered and forgotten."""
        request = self._requests.pop(ticket, None)
        if request is not None:
            self._policy.dropped(ticket)
            if not request.future.done():
                request.future.set_exception(_expired())

    async def _answer(self, requests: list[_Request]) -> None:
        """Run one batch. Every future is resolved, unless this very task is cancelled."""
        rows = sum(request.rows for request in requests)
        error: Exception
        try:
            outcome = await self._run(concat([request.columns for request in requests]))
            if outcome.n != rows:
                raise NodeContractError(f"a batch of {rows} rows came back with {outcome.n}")
            parts = outcome.split([request.rows for request in requests])
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # Not us: something that the batch waited for was cancelled, such as a remote call.
            error = TwinpathError("the call behind this batch was cancelled: send it again")
        except Exception as raised:
            error = raised
        else:
            for request, part in zip(requests, parts, strict=True):
                if not request.future.done():
                    request.future.set_result(part)
            return
        if not isinstance(error, TwinpathError):
            _LOG.error("a batch of %d requests failed", len(requests), exc_info=error)
        for request in requests:
            if not request.future.done():
                request.future.set_exception(error)


def _expired() -> DeadlineError:
    return DeadlineError("the deadline passed while the request waited; it was not run")


def _shape(columns: Columns) -> _Shape:
    return tuple((name, v.dtype.str, v.shape[1:]) for name, v in sorted(columns.items()))


def _compatible(requests: list[_Request]) -> list[list[_Request]]:
    """Requests whose columns can be joined without changing a dtype or shape, in order."""
    groups: dict[_Shape, list[_Request]] = {}
    for request in requests:
        groups.setdefault(_shape(request.columns), []).append(request)
    return list(groups.values())
