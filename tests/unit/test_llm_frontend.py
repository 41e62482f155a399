"""The short ways through vLLM's frontend, with what vLLM has around them left out."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from twinpath.nodes.llm_frontend import _Asyncio, _Eager, first_tokens_first


class Client:
    """An engine's client with the outputs of one step."""

    def __init__(self, ids: list[str]) -> None:
        self._ids = ids

    async def get_output_async(self) -> SimpleNamespace:
        """One step."""
        outputs = [SimpleNamespace(request_id=each, finish_reason=None) for each in self._ids]
        outputs[0].finish_reason = "stop"
        return SimpleNamespace(outputs=outputs, timestamp=12.5)


@pytest.mark.parametrize(
    ("new", "order", "read"),
    [({"b", "c"}, ["b", "c", "a", "d"], 14), (set(), ["a", "b", "c", "d"], 0)],
)
def test_first_tokens_are_handed_out_before_others(new: set[str], order: list[str], read: int):
    # One without a state, as of a request that was aborted, counts as begun.
    states = {each: SimpleNamespace(is_prefilling=each in new, prompt_len=7) for each in "abc"}
    engine = SimpleNamespace(
        engine_core=Client(["a", "b", "c", "d"]),
        output_processor=SimpleNamespace(request_states=states),
    )
    seen: list[tuple[float, int, int]] = []
    first_tokens_first(engine, lambda *step: seen.append(step))
    outputs = asyncio.run(engine.engine_core.get_output_async())
    assert [each.request_id for each in outputs.outputs] == order
    assert seen == [(12.5, 3, read)], "one of four ended"


def test_a_task_begins_where_it_is_made_and_goes_on_as_one():
    async def main() -> None:
        seen: list[str] = []
        free = asyncio.Event()

        async def work() -> str:
            seen.append("began")
            await free.wait()
            seen.append("went on")
            return "done"

        task = _Eager().create_task(work())
        assert seen == ["began"]
        assert not task.done()
        free.set()
        assert await task == "done"
        assert seen == ["began", "went on"]

    asyncio.run(main())


def test_one_that_has_nothing_to_wait_for_is_done_at_once():
    async def main() -> None:
        async def answer() -> int:
            return 7

        async def fail() -> None:
            raise ValueError("no")

        eager = _Eager()
        done, failed = eager.create_task(answer()), eager.create_task(fail())
        assert done.done()
        assert failed.done()
        waited, rest = await eager.wait([done, asyncio.get_running_loop().create_future()])
        assert waited == {done}
        assert len(rest) == 1
        assert await done == 7
        with pytest.raises(ValueError, match="no"):
            await failed

    asyncio.run(main())


def test_one_that_is_cancelled_closes_what_had_begun():
    async def main() -> None:
        seen: list[str] = []

        async def work() -> None:
            try:
                await asyncio.sleep(10)
            finally:
                seen.append("closed")

        early = _Eager().create_task(work())
        early.cancel()  # before its first step as a task
        late = _Eager().create_task(work())
        await asyncio.sleep(0)
        late.cancel()
        for task in (early, late):
            with pytest.raises(asyncio.CancelledError):
                await task
        await asyncio.sleep(0)
        assert seen == ["closed", "closed"]

    asyncio.run(main())


def test_a_gather_of_one_waits_for_it_without_a_task():
    async def main() -> None:
        loops = asyncio.get_running_loop()
        made: list[Any] = []
        loops.set_task_factory(
            lambda loop, coro, **more: made.append(coro) or asyncio.Task(coro, loop=loop, **more)
        )

        async def one() -> int:
            return 1

        assert await _Asyncio().gather(one()) == [1]
        assert not made
        assert await _Asyncio().gather(one(), one()) == [1, 1]
        assert len(made) == 2
        assert _Asyncio().sleep is asyncio.sleep

    asyncio.run(main())
