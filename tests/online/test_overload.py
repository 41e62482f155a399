"""More clients than there is room for: who is refused, who is late, and who hangs up. Rows of the
graph `waiting` say for how many seconds they keep it busy; 100 may wait behind them."""

import asyncio
from collections.abc import Callable

import pytest

from online.callers import Caller, Reply, all_right, answered
from online.conftest import Served, until

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(240)]
#: Longer than everything that happens meanwhile takes, also where cores are few.
BUSY_S = 6.0


class Queue:
    """A graph that is busy with one row, and what it has counted since."""

    def __init__(self, served: Served) -> None:
        self.port = served.session.http_port
        self._served, self._numbers = served, iter(range(1000))
        self._before = self._stats()

    def _stats(self) -> tuple[int, int]:
        with self._served.client("waiting") as client:
            found = client.get("/v2/models/waiting/stats").json()["model_stats"][0]
        return found["inference_count"], found["inference_stats"]["fail"]["count"]

    async def counted(self) -> tuple[int, int]:
        """Rows that were run, and requests that were not answered with rows."""
        now = await asyncio.to_thread(self._stats)
        return now[0] - self._before[0], now[1] - self._before[1]

    async def counts(self, wanted: tuple[int, int]) -> None:
        """Wait for these counts."""
        async with asyncio.timeout(30):
            while (found := await self.counted()) != wanted:
                assert found <= wanted, f"{found} is more than {wanted}"
                await asyncio.sleep(0.1)

    def is_idle(self) -> bool:
        """Whether Serve's gauge of requests under way, by which it drains, is back at zero."""
        name, app = "ray_serve_replica_processing_queries{", 'application="waiting"'
        found = [line for line in self._served.metrics() if name in line and app in line]
        return len(found) == 1 and float(found[0].rpartition(" ")[2]) == 0

    async def occupied(self) -> tuple[Caller, "asyncio.Task[Reply]"]:
        """A client whose row runs from now on."""
        first = Caller(self.port, next(self._numbers), BUSY_S)
        await first.ask()
        await asyncio.sleep(0.5)
        return first, asyncio.create_task(first.answer())

    async def callers(self, count: int, **headers: str) -> list[Caller]:
        """So many clients that have asked."""
        callers = [Caller(self.port, next(self._numbers)) for _ in range(count)]
        await asyncio.gather(*(caller.ask(**headers) for caller in callers))
        return callers


@pytest.fixture
def story(served: Served) -> Callable[[], Queue]:
    return lambda: Queue(served)


async def test_beyond_the_bound_all_are_refused_at_once_and_all_others_answered(
    story: Callable[[], Queue],
):
    queue = await asyncio.to_thread(story)
    first, running = await queue.occupied()
    callers = await queue.callers(164)
    pending = {asyncio.create_task(c.answer()): c for c in callers}
    async with asyncio.timeout(BUSY_S):
        refused: set[asyncio.Task[Reply]] = set()
        while len(refused) < 64:
            done, _ = await asyncio.wait(set(pending) - refused, return_when="FIRST_COMPLETED")
            refused |= done
    assert not running.done(), "they do not wait for the row that runs"
    for task in refused:
        reply = task.result()
        assert (reply.status, reply.code) == (503, "overloaded")
        assert int(reply.headers["retry-after"]) >= 1
    accepted = [(caller, await task) for task, caller in pending.items() if task not in refused]
    assert len(accepted) == 100
    assert all(caller.is_right(reply) for caller, reply in accepted)
    assert first.is_right(await running)
    await queue.counts((101, 64))


async def test_half_of_the_queue_is_late_and_is_told_so_while_another_runs(
    story: Callable[[], Queue],
):
    queue = await asyncio.to_thread(story)
    first, running = await queue.occupied()
    patient, hasty = await asyncio.gather(
        queue.callers(40), queue.callers(40, x_request_timeout_ms="300")
    )
    for reply in await answered(hasty):
        assert (reply.status, reply.code) == (504, "deadline_exceeded")
    assert not running.done(), "as soon as their deadline passes"
    assert all_right(patient, await answered(patient))
    assert first.is_right(await running)
    # The rows that came too late were never run.
    await queue.counts((41, 40))


async def test_fifty_of_a_hundred_hang_up_and_their_places_are_free_at_once(
    story: Callable[[], Queue],
):
    queue = await asyncio.to_thread(story)
    first, running = await queue.occupied()
    leaving, staying = await queue.callers(50), await queue.callers(50)
    for caller in leaving:
        caller.hang_up()
    # Counted as requests without an answer: the replica knows that they are gone.
    await queue.counts((0, 50))
    later = await queue.callers(50)
    [too_many] = await queue.callers(1)
    assert (await too_many.answer()).status == 503
    assert not running.done(), "their places were free before their rows' turn came"
    replies = await answered(staying + later)
    assert all_right(staying + later, replies)
    assert first.is_right(await running)
    await queue.counts((101, 51))
    await asyncio.to_thread(until, queue.is_idle, 60, "Serve counts no request under way")
