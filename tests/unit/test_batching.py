"""The batcher: whatever callers do, every one of them gets its own answer or its own error."""

import asyncio
import contextvars
import time
from collections.abc import Awaitable, Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from twinpath import Graph, Node
from twinpath.errors import DeadlineError, NodeContractError, OverloadedError
from twinpath.graph.columns import Columns, Outcome, row_count
from twinpath.graph.placement import Batch
from twinpath.graph.stage import Executor
from twinpath.online.batcher import Batcher
from twinpath.online.policy import Priority

Run = Callable[[Columns], Awaitable[Outcome]]


def rows(*values: float) -> Columns:
    return {"x": np.array(values, dtype=np.float64)}


class Echo:
    """A run that returns its input and remembers the batches; ``gate`` holds it."""

    def __init__(self) -> None:
        self.batches: list[list[float]] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, columns: Columns) -> Outcome:
        self.batches.append(columns["x"].tolist())
        await self.gate.wait()
        return Outcome.success(columns, row_count(columns))


def batcher(run: Run, max_size: int = 256, **limits: int) -> Batcher:
    return Batcher(run, Batch(max_size=max_size), **limits)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 (any condition, on one loop)
            await asyncio.sleep(0)


async def test_requests_of_one_loop_iteration_travel_together_and_each_gets_its_own():
    echo = Echo()
    queue = batcher(echo)
    answers = await asyncio.gather(*(queue.submit(rows(i, -i)) for i in range(5)))
    assert len(echo.batches) == 1
    assert [a.columns["x"].tolist() for a in answers] == [[i, -i] for i in range(5)]


async def test_what_comes_while_a_batch_runs_becomes_the_next_one():
    echo = Echo()
    echo.gate.clear()
    queue = batcher(echo)
    first = asyncio.create_task(queue.submit(rows(0)))
    await until(lambda: len(echo.batches) == 1)
    others = [asyncio.create_task(queue.submit(rows(i))) for i in (1, 2, 3)]
    await until(lambda: queue.queued_rows == 3)
    assert queue.running_rows == 1
    echo.gate.set()
    await asyncio.gather(first, *others)
    assert echo.batches == [[0], [1, 2, 3]]
    assert (queue.queued_rows, queue.running_rows) == (0, 0)


async def test_a_full_queue_gives_up_low_priorities_for_higher_ones():
    echo = Echo()
    echo.gate.clear()
    queue = batcher(echo, max_queue_rows=2)

    def ask(value: float, priority: Priority) -> "asyncio.Task[Outcome]":
        return asyncio.create_task(queue.submit(rows(value), priority=priority))

    running = ask(0, Priority.NORMAL)
    await until(lambda: queue.running_rows == 1)
    low, normal = ask(1, Priority.LOW), ask(2, Priority.NORMAL)
    await until(lambda: queue.queued_rows == 2)
    high = ask(3, Priority.HIGH)
    with pytest.raises(OverloadedError, match="higher priority"):
        await low
    with pytest.raises(OverloadedError, match="2 rows wait"):
        await queue.submit(rows(4), priority=Priority.NORMAL)
    echo.gate.set()
    await asyncio.gather(running, normal, high)
    assert echo.batches == [[0], [3, 2]]


async def test_deadlines_end_each_at_its_own_time():
    echo = Echo()
    echo.gate.clear()
    queue = batcher(echo)
    running = asyncio.create_task(queue.submit(rows(0)))
    await until(lambda: queue.running_rows == 1)
    now_s = time.monotonic()
    ended: list[float] = []

    async def ask(after_s: float) -> None:
        with pytest.raises(DeadlineError):
            await queue.submit(rows(1), now_s + after_s)
        ended.append(time.monotonic() - now_s)

    await asyncio.gather(ask(0.3), ask(0.1), ask(0.2))
    for wanted_s, seen_s in zip((0.1, 0.2, 0.3), ended, strict=True):
        assert wanted_s <= seen_s < wanted_s + 0.09
    echo.gate.set()
    await running
    assert echo.batches == [[0]]
    assert queue.queued_rows == 0


async def test_a_request_learns_how_it_went():
    echo = Echo()
    queue = batcher(echo)
    seen = []
    queue.watch = lambda requests, timing: seen.append((requests, timing.batch_rows))
    (_, first), (_, second) = await asyncio.gather(queue.timed(rows(1)), queue.timed(rows(2, 3)))
    assert (first.batch_rows, second.batch_rows) == (3, 3)
    assert 0 <= first.queue_s < 1
    assert 0 <= first.run_s < 1
    assert seen == [(2, 3)]


async def test_a_caller_that_fails_at_its_answer_harms_nobody():
    queue = batcher(Echo())
    answers: list[float] = []

    def broken(result: Outcome | Exception, timing: object) -> None:
        raise RuntimeError("the caller's own")

    def fine(result: Outcome | Exception, timing: object) -> None:
        assert isinstance(result, Outcome)
        answers.extend(result.columns["x"].tolist())

    queue.enqueue(rows(1), broken)
    queue.enqueue(rows(2), fine)
    await queue.close()
    assert answers == [2]


async def test_a_full_queue_refuses_at_once_and_says_when_to_come_back():
    echo = Echo()
    echo.gate.clear()
    queue = batcher(echo, max_queue_rows=2)
    accepted = [asyncio.create_task(queue.submit(rows(0)))]
    await until(lambda: queue.running_rows == 1)
    accepted += [asyncio.create_task(queue.submit(rows(1, 2)))]
    await until(lambda: queue.queued_rows == 2)
    with pytest.raises(OverloadedError, match="2 rows wait and the limit is 2") as refused:
        await queue.submit(rows(3))
    assert refused.value.retry_after_s >= 1
    echo.gate.set()
    await asyncio.gather(*accepted)
    assert echo.batches == [[0], [1, 2]]


async def test_one_request_larger_than_the_queue_is_taken_when_nothing_waits():
    queue = batcher(Echo(), max_size=2, max_queue_rows=2)
    answer = await queue.submit(rows(*range(9)))
    assert answer.n == 9


async def test_a_deadline_that_has_passed_is_never_computed():
    echo = Echo()
    with pytest.raises(DeadlineError):
        await batcher(echo).submit(rows(1), deadline_s=time.monotonic() - 1)
    assert echo.batches == []


async def test_a_deadline_is_kept_while_a_long_batch_runs_ahead():
    echo = Echo()
    echo.gate.clear()
    queue = batcher(echo)
    ahead = asyncio.create_task(queue.submit(rows(0)))
    await until(lambda: queue.running_rows == 1)
    with pytest.raises(DeadlineError):
        async with asyncio.timeout(2):
            await queue.submit(rows(1), deadline_s=time.monotonic() + 0.02)
    assert queue.queued_rows == 0, "it frees its place in the queue"
    echo.gate.set()
    await ahead
    assert echo.batches == [[0]]


async def test_a_cancelled_caller_is_dropped_before_it_is_computed_and_its_mates_are_not():
    echo = Echo()
    echo.gate.clear()
    queue = batcher(echo)
    first = asyncio.create_task(queue.submit(rows(0)))
    await until(lambda: queue.running_rows == 1)
    waiting = [asyncio.create_task(queue.submit(rows(i))) for i in (1, 2, 3)]
    await until(lambda: queue.queued_rows == 3)
    waiting[1].cancel()
    await until(lambda: queue.queued_rows == 2)
    echo.gate.set()
    answers = await asyncio.gather(first, waiting[0], waiting[2])
    assert [a.columns["x"].tolist() for a in answers] == [[0], [1], [3]]
    assert echo.batches == [[0], [1, 3]]


async def test_a_caller_cancelled_while_its_batch_runs_leaves_its_mates_their_answers():
    echo = Echo()
    echo.gate.clear()
    queue = batcher(echo)
    tasks = [asyncio.create_task(queue.submit(rows(i))) for i in range(3)]
    await until(lambda: queue.running_rows == 3)
    tasks[0].cancel()
    await asyncio.sleep(0)
    echo.gate.set()
    answers = await asyncio.gather(*tasks[1:])
    assert [a.columns["x"].tolist() for a in answers] == [[1], [2]]


async def test_a_run_that_raises_fails_its_batch_and_the_next_one_works():
    broken = [ZeroDivisionError("a bug")]

    async def run(columns: Columns) -> Outcome:
        if broken:
            raise broken.pop()
        return Outcome.success(columns, row_count(columns))

    queue = batcher(run)
    results = await asyncio.gather(
        queue.submit(rows(1)), queue.submit(rows(2)), return_exceptions=True
    )
    assert [type(result) for result in results] == [ZeroDivisionError] * 2
    assert (await queue.submit(rows(3))).ok


async def test_a_run_that_returns_too_few_rows_is_an_error_not_a_hang():
    async def run(columns: Columns) -> Outcome:
        return Outcome.success({"x": columns["x"][:-1]}, row_count(columns) - 1)

    async with asyncio.timeout(2):
        results = await asyncio.gather(
            *(batcher_.submit(rows(i)) for batcher_ in [batcher(run)] for i in range(3)),
            return_exceptions=True,
        )
    assert [type(result) for result in results] == [NodeContractError] * 3


async def test_a_run_that_is_cancelled_from_within_resolves_every_caller():
    # A call to a replica that goes away can end as a cancellation.
    async def run(columns: Columns) -> Outcome:
        raise asyncio.CancelledError

    queue = batcher(run)
    different = {"x": np.zeros((1, 3))}
    async with asyncio.timeout(2):
        results = await asyncio.gather(
            queue.submit(rows(1)), queue.submit(different), return_exceptions=True
        )
    assert all(isinstance(result, Exception) for result in results), results
    assert (queue.queued_rows, queue.running_rows) == (0, 0)


async def test_requests_of_different_shape_or_dtype_do_not_spoil_each_other():
    shapes: list[tuple[int, ...]] = []

    async def run(columns: Columns) -> Outcome:
        shapes.append(columns["x"].shape)
        return Outcome.success(columns, row_count(columns))

    given = [
        {"x": np.zeros((1, 3))},
        {"x": np.zeros((2, 5))},
        {"x": np.zeros((1, 3))},
        {"x": np.zeros(1, dtype=np.int64)},
        {"y": np.zeros(1)},
    ]

    async def run_y(columns: Columns) -> Outcome:
        if "y" in columns:
            return Outcome.success(columns, 1)
        return await run(columns)

    queue = batcher(run_y)
    answers = await asyncio.gather(*(queue.submit(columns) for columns in given))
    for columns, answer in zip(given, answers, strict=True):
        for name, values in columns.items():
            assert answer.columns[name].shape == values.shape
            assert answer.columns[name].dtype == values.dtype
    assert shapes == [(2, 3), (2, 5), (1,)]


async def test_close_waits_for_what_was_accepted():
    echo = Echo()
    echo.gate.clear()
    queue = batcher(echo, max_size=1)
    tasks = [asyncio.create_task(queue.submit(rows(i))) for i in range(3)]
    await until(lambda: queue.running_rows == 1)
    closing = asyncio.create_task(queue.close())
    await asyncio.sleep(0.02)
    assert not closing.done()
    echo.gate.set()
    async with asyncio.timeout(2):
        await closing
    assert all(task.done() for task in tasks)


async def test_a_batch_does_not_run_in_the_context_of_the_caller_that_came_first():
    # Serve cancels the calls made in a request's context when its client hangs up.
    request: contextvars.ContextVar[str] = contextvars.ContextVar("request", default="none")
    seen: list[str] = []

    async def run(columns: Columns) -> Outcome:
        seen.append(request.get())
        request.set("left by a batch")
        return Outcome.success(columns, row_count(columns))

    queue = batcher(run)

    async def call(name: str) -> None:
        request.set(name)
        await queue.submit(rows(1))

    await asyncio.gather(call("first"), call("second"))
    await call("third")
    assert seen == ["none", "none"]


class _X(BaseModel):
    x: float


class _Y(BaseModel):
    y: float


class _Poisoned(Node):
    inputs = {"x": "float64"}
    outputs = {"y": "float64"}

    def predict(self, columns: Columns) -> Columns:
        if (columns["x"] == 13).any():
            raise ValueError("thirteen")
        return {"y": columns["x"] * 2}


async def test_a_poison_row_fails_its_own_request_only():
    graph = Graph("poisoned", input=_X, output=_Y)
    with graph as number:
        graph.output(_Poisoned()(number))
    executor = Executor(graph.plan)
    executor.setup()
    queue = batcher(executor.run)
    answers = await asyncio.gather(*(queue.submit(rows(i, i + 0.5)) for i in range(10, 17)))
    for i, answer in zip(range(10, 17), answers, strict=True):
        if i == 13:
            assert set(answer.errors) == {0}
            assert "thirteen" in answer.errors[0].message
            assert answer.columns["y"].tolist() == [27.0]
        else:
            assert answer.ok
            assert answer.columns["y"].tolist() == [2.0 * i, 2.0 * i + 1]


@st.composite
def _callers(draw: st.DrawFn) -> list[tuple[int, int, int | None]]:
    """(loop turns before it submits, rows, turns before it is cancelled) of each caller."""
    turns = st.integers(0, 6)
    caller = st.tuples(turns, st.integers(1, 5), st.none() | turns)
    return draw(st.lists(caller, min_size=1, max_size=40))


@settings(max_examples=150, deadline=None)
@given(
    callers=_callers(),
    max_size=st.integers(1, 8),
    max_inflight=st.integers(1, 3),
    run_turns=st.integers(0, 5),
    wait_ms=st.sampled_from([0.0, 0.2]),
)
def test_every_caller_is_answered_with_its_own_rows_whoever_is_cancelled_when(
    callers: list[tuple[int, int, int | None]],
    max_size: int,
    max_inflight: int,
    run_turns: int,
    wait_ms: float,
) -> None:
    seen: list[float] = []

    async def story() -> None:
        async def run(columns: Columns) -> Outcome:
            seen.extend(columns["x"].tolist())
            for _ in range(run_turns):
                await asyncio.sleep(0)
            return Outcome.success({"y": columns["x"] * 2}, row_count(columns))

        queue = Batcher(
            run, Batch(max_size=max_size, max_wait_ms=wait_ms), max_inflight=max_inflight
        )

        async def call(number: int, start: int, size: int) -> None:
            for _ in range(start):
                await asyncio.sleep(0)
            mine = number * 10.0 + np.arange(size)
            answer = await queue.submit({"x": mine})
            assert answer.columns["y"].tolist() == (mine * 2).tolist()

        tasks = []
        async with asyncio.timeout(10):
            for number, (start, size, cancel) in enumerate(callers):
                task = asyncio.create_task(call(number, start, size))
                tasks.append(task)
                if cancel is not None:
                    asyncio.get_running_loop().call_later(cancel * 0.0001, task.cancel)
            results = await asyncio.gather(*tasks, return_exceptions=True)
            await queue.close()
        for (_, _, cancel), result in zip(callers, results, strict=True):
            assert result is None or (
                cancel is not None and isinstance(result, asyncio.CancelledError)
            )
        assert (queue.queued_rows, queue.running_rows) == (0, 0)

    asyncio.run(story())
    assert len(seen) == len(set(seen)), "no row is computed twice"
