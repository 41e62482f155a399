"""ASGI apps whose callers may leave before the answer is complete: at a deadline, or by a cancel.

Endpoints of vLLM that are cancelled leave their sequences to the engine, since it is another task
that waits for these. They end it when they hear that the caller hung up, so that is what they hear.
"""

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: What an app whose caller is gone has to end by itself in.
LEAVE_S = 5.0
#: Apps that are about to end; a task needs somebody who holds it.
_LEAVING: set[asyncio.Task[None]] = set()


async def run(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request. When this is cancelled it ends at once: the app hears that the caller is
    gone, nothing of what it sends then arrives, and it is cancelled only if it stays."""
    over = asyncio.get_running_loop().create_future()

    async def told() -> Message:
        if not over.done():
            asking = asyncio.ensure_future(receive())
            try:
                await asyncio.wait({asking, over}, return_when=asyncio.FIRST_COMPLETED)
                if asking.done():
                    return asking.result()
            finally:
                asking.cancel()
        return {"type": "http.disconnect"}

    async def sent(message: Message) -> None:
        if not over.done():
            await send(message)

    async def answer() -> None:
        await app(scope, told, sent)

    running = asyncio.create_task(answer())
    try:
        await asyncio.wait({running})
    finally:
        if not running.done():
            over.set_result(None)
            leaving = asyncio.create_task(_left(running))
            _LEAVING.add(leaving)
            leaving.add_done_callback(_LEAVING.discard)
    running.result()


async def gone(receive: Receive) -> None:
    """Returns when the caller has hung up. The body must have been read: what comes is dropped."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _left(running: "asyncio.Task[None]") -> None:
    await asyncio.wait({running}, timeout=LEAVE_S)
    running.cancel()
    # Whatever it raised, nobody is there whom that concerns.
    await asyncio.gather(running, return_exceptions=True)
