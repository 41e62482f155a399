"""The batcher: a bounded, cancel-safe queue around the batching policy, on one event loop."""

import asyncio
import contextvars
import functools
import itertools
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from twinpath.errors import (
    DeadlineError,
    NodeContractError,
    OverloadedError,
    TwinpathError,
)
from twinpath.graph.columns import Columns, Outcome, concat, row_count
from twinpath.graph.context import DEADLINE_S
from twinpath.graph.placement import Batch
from twinpath.online.policy import BatchPolicy, Dispatch, Priority, WakeAt

_LOG = logging.getLogger(__name__)
_Shape = tuple[tuple[str, str, tuple[int, ...]], ...]


class Timing(NamedTuple):
    """How a request went through: seconds in the queue, seconds of its batch, the batch's rows,
    and the seconds of each node in it."""

    queue_s: float
    run_s: float
    batch_rows: int
    nodes_s: dict[str, float]


#: Gets the outcome, or the error that stands for all rows of the request, and its timing (None
#: when the rows were not run). It must not raise.
Done = Callable[[Outcome | Exception, Timing | None], None]


@dataclass(slots=True, eq=False)
class _Request:
    columns: Columns
    rows: int
    done: Done
    arrived_s: float
    deadline_s: float | None


class Batcher:
    """Joins concurrent requests into batches for ``run``.

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
        #: Told of every batch that was run: its number of requests and its timing (whose
        #: ``queue_s`` is that of the oldest request).
        self.watch: Callable[[int, Timing], None] | None = None
        self._requests: dict[int, _Request] = {}
        self._tickets = itertools.count()
        self._running_rows = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._flush_due = False
        self._wake: asyncio.TimerHandle | None = None
        #: One timer for the earliest deadline of all, since one for each would cost more.
        self._expiry: asyncio.TimerHandle | None = None
        self._expiry_s = math.inf
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
        priority: Priority = Priority.NORMAL,
    ) -> Outcome:
        """The outcome of these rows; see :meth:`enqueue`, whose errors it raises."""
        outcome, _ = await self.timed(columns, deadline_s, priority)
        return outcome

    async def timed(
        self,
        columns: Columns,
        deadline_s: float | None = None,
        priority: Priority = Priority.NORMAL,
    ) -> tuple[Outcome, Timing]:
        """The outcome of these rows and how it came about. Cancelling it gives the rows up."""
        future: asyncio.Future[tuple[Outcome, Timing]]
        future = asyncio.get_running_loop().create_future()
        done = functools.partial(_resolve, future)
        ticket = self.enqueue(columns, done, deadline_s, priority)
        try:
            return await future
        finally:
            if not future.done() or future.cancelled():
                self.give_up(ticket)

    def enqueue(
        self,
        columns: Columns,
        done: Done,
        deadline_s: float | None = None,
        priority: Priority = Priority.NORMAL,
    ) -> int:
        """Queue these rows; ``done`` gets their outcome, exactly once, unless given up before.

        ``deadline_s`` is on ``time.monotonic``'s clock. Raises OverloadedError at once when the
        queue is full and nothing of a lower priority can be shed for it. ``done`` gets
        DeadlineError as soon as the deadline passes while the rows wait, OverloadedError when
        they are shed (in both cases they are never run), and whatever ``run`` raises. The ticket
        that is returned is for :meth:`give_up`.
        """
        rows = row_count(columns)
        waiting = self._policy.queued_rows
        if waiting and waiting + rows > self._max_queue_rows:
            self._make_room(rows, priority)
        loop = asyncio.get_running_loop()
        now_s = time.monotonic()
        ticket = next(self._tickets)
        request = _Request(columns, rows, done, now_s, deadline_s)
        self._requests[ticket] = request
        self._idle.clear()
        self._policy.arrived(ticket, rows, now_s, priority)
        if not self._flush_due:
            self._flush_soon(loop)
        if deadline_s is not None and deadline_s < self._expiry_s:
            self._expire_at(deadline_s)
        return ticket

    def give_up(self, ticket: int) -> None:
        """Forget a request: it is not run if it still waits, and ``done`` is not called."""
        request = self._requests.pop(ticket, None)
        if request is not None:
            self._policy.dropped(ticket)
            self._set_idle()

    async def close(self) -> None:
        """Wait until everything accepted has been answered."""
        await self._idle.wait()

    def _set_idle(self) -> None:
        if not self._requests and not self._tasks:
            self._idle.set()

    def _make_room(self, rows: int, priority: Priority) -> None:
        waiting = self._policy.queued_rows
        retry_after_s = max(1.0, round(self._average_s * len(self._requests), 1))
        shed = self._policy.shed_for(priority, waiting + rows - self._max_queue_rows)
        if shed is None:
            raise OverloadedError(
                f"{waiting} rows wait and the limit is {self._max_queue_rows}: try again in "
                f"{retry_after_s:g} s",
                retry_after_s,
            )
        for ticket in shed:
            self._policy.dropped(ticket)
            text = f"given up for requests of a higher priority: try again in {retry_after_s:g} s"
            self._fail(ticket, OverloadedError(text, retry_after_s))

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
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._set_idle()

    async def _dispatch(self, instruction: Dispatch) -> None:
        requests = self._take(instruction.tickets)
        rows = sum(request.rows for request in requests)
        # The event loop has read from its sockets once more since the batch was decided.
        late = self._take(self._policy.top_up(rows))
        requests += late
        rows += sum(request.rows for request in late)
        self._running_rows += rows
        started_s = time.monotonic()
        answered = False
        try:
            for group in _compatible(requests):
                await self._answer(group)
            answered = True
        finally:
            if not answered:  # this task itself was cancelled: at shutdown only
                for request in requests:
                    _done(request, _cancelled(), None)
            self._running_rows -= rows
            self._average_s += 0.2 * (time.monotonic() - started_s - self._average_s)
            self._policy.finished()
            self._flush_soon(asyncio.get_running_loop())

    def _take(self, tickets: Iterable[int]) -> list[_Request]:
        """The requests that are still wanted; the others are answered here."""
        now_s = time.monotonic()
        wanted = []
        for ticket in tickets:
            request = self._requests.pop(ticket, None)
            if request is None:
                continue
            if request.deadline_s is not None and now_s >= request.deadline_s:
                _done(request, _expired(), None)
            else:
                wanted.append(request)
        return wanted

    def _fail(self, ticket: int, error: TwinpathError) -> None:
        request = self._requests.pop(ticket, None)
        if request is not None:
            _done(request, error, None)

    def _expire_at(self, deadline_s: float) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
        self._expiry_s = deadline_s
        # An event loop's clock and time.monotonic are the same one.
        loop = asyncio.get_running_loop()
        self._expiry = loop.call_at(deadline_s, self._expire, context=self._context)

    def _expire(self) -> None:
        """A deadline has come: requests that still wait beyond theirs are answered."""
        now_s, next_s = time.monotonic(), math.inf
        self._expiry, self._expiry_s = None, math.inf
        for ticket, request in list(self._requests.items()):
            if request.deadline_s is None:
                continue
            if request.deadline_s <= now_s:
                self._policy.dropped(ticket)
                self._fail(ticket, _expired())
            else:
                next_s = min(next_s, request.deadline_s)
        if next_s < math.inf:
            self._expire_at(next_s)
        self._set_idle()

    async def _answer(self, requests: list[_Request]) -> None:
        """Run one batch. Every request is answered, unless this very task is cancelled."""
        rows = sum(request.rows for request in requests)
        started_s = time.monotonic()
        DEADLINE_S.set(_last_deadline(requests))
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
            error = _cancelled()
        except Exception as raised:
            error = raised
        else:
            run_s = time.monotonic() - started_s
            for request, part in zip(requests, parts, strict=True):
                queue_s = started_s - request.arrived_s
                _done(request, part, Timing(queue_s, run_s, rows, outcome.nodes_s))
            if self.watch is not None:
                oldest_s = started_s - requests[0].arrived_s
                self.watch(len(requests), Timing(oldest_s, run_s, rows, outcome.nodes_s))
            return
        if not isinstance(error, TwinpathError):
            _LOG.error("a batch of %d requests failed", len(requests), exc_info=error)
        for request in requests:
            _done(request, error, None)


def _last_deadline(requests: list[_Request]) -> float | None:
    """When nobody waits for these any more; None while somebody waits for ever."""
    latest_s = 0.0
    for request in requests:
        if request.deadline_s is None:
            return None
        latest_s = max(latest_s, request.deadline_s)
    return latest_s


def _done(request: _Request, result: Outcome | Exception, timing: Timing | None) -> None:
    """Tell the caller. One that fails at it must not take its batch mates' answers away."""
    try:
        request.done(result, timing)
    except Exception:
        _LOG.exception("an answer could not be given")


def _resolve(
    future: "asyncio.Future[tuple[Outcome, Timing]]",
    result: Outcome | Exception,
    timing: Timing | None,
) -> None:
    if future.done():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    elif timing is not None:
        future.set_result((result, timing))


def _expired() -> DeadlineError:
    return DeadlineError("the deadline passed while the request waited; it was not run")


def _cancelled() -> TwinpathError:
    """Something that the batch waited for was cancelled, such as a remote call."""
    return TwinpathError("the call behind this batch was cancelled: send it again")


def _shape(columns: Columns) -> _Shape:
    return tuple((name, v.dtype.str, v.shape[1:]) for name, v in sorted(columns.items()))


def _alike(one: Columns, other: Columns) -> bool:
    """Whether two have the same columns; `_shape` says the same of many, and takes longer."""
    if len(one) != len(other):
        return False
    for name, values in one.items():
        found = other.get(name)
        if found is None or found.dtype != values.dtype or found.shape[1:] != values.shape[1:]:
            return False
    return True


def _compatible(requests: list[_Request]) -> list[list[_Request]]:
    """Requests whose columns can be joined without changing a dtype or shape, in order."""
    first = requests[0].columns
    if all(_alike(first, request.columns) for request in requests[1:]):
        return [requests]
    groups: dict[_Shape, list[_Request]] = {}
    for request in requests:
        groups.setdefault(_shape(request.columns), []).append(request)
    return list(groups.values())
