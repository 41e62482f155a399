"""Apps that are left before their answer is complete."""

import asyncio
from typing import Any

import pytest

from twinpath.online import leaving
from twinpath.online.leaving import run

SCOPE = {"type": "http"}


class Caller:
    """One end of ASGI: gives a request, then waits; keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.hung_up = asyncio.Event()
        self._asked = False

    async def receive(self) -> Any:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": b"hello"}
        await self.hung_up.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)


class Sequence:
    """An app that waits, as vLLM's do, for work in another task until the caller hangs up."""

    def __init__(self, *, listens: bool = True) -> None:
        self.begun, self.ended = asyncio.Event(), asyncio.Event()
        self.body = b""
        self._listens = listens

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.body = (await receive())["body"]
        await send({"type": "first"})
        working = asyncio.create_task(self._work())
        self.begun.set()
        if not self._listens:
            await asyncio.wait({working})
        assert (await receive())["type"] == "http.disconnect"
        working.cancel()
        await asyncio.wait({working})
        await send({"type": "last"})

    async def _work(self) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            self.ended.set()


async def test_an_app_whose_run_is_cancelled_hears_that_its_caller_is_gone():
    caller, app = Caller(), Sequence()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await run(app, SCOPE, caller.receive, caller.send)
    await asyncio.wait_for(app.ended.wait(), 10)
    await asyncio.gather(*leaving._LEAVING)
    assert app.body == b"hello"
    assert caller.sent == [{"type": "first"}], "nothing comes after the end"


async def test_an_app_hears_of_a_caller_that_hangs_up_and_ends_its_answer():
    caller, app = Caller(), Sequence()
    running = asyncio.create_task(run(app, SCOPE, caller.receive, caller.send))
    await app.begun.wait()
    caller.hung_up.set()
    await running
    assert app.ended.is_set()
    assert caller.sent == [{"type": "first"}, {"type": "last"}]


async def test_an_app_that_stays_is_cancelled(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(leaving, "LEAVE_S", 0.05)
    caller, app = Caller(), Sequence(listens=False)
    running = asyncio.create_task(run(app, SCOPE, caller.receive, caller.send))
    await app.begun.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert len(leaving._LEAVING) == 1
    await asyncio.wait_for(asyncio.gather(*leaving._LEAVING), 10)
    assert not leaving._LEAVING


async def test_what_an_app_raises_is_raised():
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise KeyError("broken")

    caller = Caller()
    with pytest.raises(KeyError):
        await run(broken, SCOPE, caller.receive, caller.send)
