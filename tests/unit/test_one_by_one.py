"""Requests that come together begin one by one, with turns of the loop between."""

import asyncio

from twinpath.online.one_by_one import TURNS, OneByOne


async def turns(seen: list[str]) -> None:
    """Counts turns of the loop."""
    while True:
        seen.append(".")
        await asyncio.sleep(0)


def test_those_that_come_together_begin_in_order_with_turns_between():
    async def main() -> str:
        seen: list[str] = []
        door = OneByOne()

        async def request(name: str) -> None:
            await door.begin()
            seen.append(name)

        counting = asyncio.create_task(turns(seen))
        await asyncio.gather(*(request(name) for name in "abcd"))
        counting.cancel()
        return "".join(seen)

    seen = asyncio.run(main())
    assert [each for each in seen if each != "."] == list("abcd")
    between = [len(part) for part in seen.replace("b", "a").replace("c", "a").split("a")[1:-1]]
    assert min(between) >= TURNS


def test_one_that_comes_alone_does_not_wait():
    async def main() -> None:
        door = OneByOne()
        for _ in range(3):
            coroutine = door.begin()
            try:
                coroutine.send(None)
            except StopIteration:
                pass
            else:
                raise AssertionError("it waited")
            await asyncio.sleep(0.001)

    asyncio.run(main())


def test_one_that_leaves_while_it_waits_holds_nobody_up():
    async def main() -> list[str]:
        seen: list[str] = []
        door = OneByOne()

        async def request(name: str) -> None:
            await door.begin()
            seen.append(name)

        tasks = [asyncio.create_task(request(name)) for name in "abcd"]
        await asyncio.sleep(0)
        tasks[1].cancel()
        await asyncio.wait(tasks)
        await door.begin()
        return seen

    assert asyncio.run(asyncio.wait_for(main(), 5)) == ["a", "c", "d"]
