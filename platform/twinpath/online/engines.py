"""An engine in a replica: looked after, and asked for whole requests to its OpenAI API.

The engine of a placed node has the ingress in another process. A request goes there as what ASGI
says of it, and comes back as ASGI's messages, as many at a time as are ready.
"""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from starlette.types import Message, Receive

from twinpath.nodes.llm_metrics import samples
from twinpath.nodes.llm_usage import USAGE, Usage
from twinpath.online.engine_metrics import EngineMetrics
from twinpath.online.health import end_with
from twinpath.online.leaving import run
from twinpath.online.metrics import Make


@dataclass(frozen=True)
class Wanted:
    """A request: what of ASGI's scope the engine's endpoints read, and the body."""

    scope: dict[str, Any]
    body: bytes


@dataclass(frozen=True)
class Part:
    """Messages of an answer, and what the request has cost so far."""

    messages: list[Message]
    prompt_tokens: int
    completion_tokens: int


class EngineSide:
    """What a replica does for the engine of ``node`` beside asking it for rows. Made in the event
    loop of the replica."""

    def __init__(self, node: Any, make: Make) -> None:
        self._node = node
        self._app: asyncio.Future[Any] | None = None
        metrics = EngineMetrics(make, samples)
        self._tasks = {
            asyncio.create_task(end_with(node.check_health)),
            asyncio.create_task(metrics.publish()),
        }

    def close(self) -> None:
        """Look after it no more."""
        for task in self._tasks:
            task.cancel()

    async def app(self) -> Any:
        """The engine's OpenAI app, made once."""
        if self._app is None:
            self._app = asyncio.ensure_future(self._node.openai_app())
        return await asyncio.shield(self._app)

    async def answer(self, wanted: Wanted) -> AsyncGenerator[Part]:
        """Parts of the answer as they come. Whoever closes this aborts the engine's work.

        Raises RetryLaterError when the engine is dead.
        """
        self._node.check_health()
        app = await self.app()
        usage = Usage()
        messages: asyncio.Queue[Message | None] = asyncio.Queue()

        async def relay() -> None:
            USAGE.set(usage)
            try:
                await run(app, wanted.scope, _receive(wanted.body), messages.put)
            finally:
                messages.put_nowait(None)

        running = asyncio.create_task(relay())
        try:
            ended = False
            while not ended:
                ready = [await messages.get()]
                while not messages.empty():
                    ready.append(messages.get_nowait())
                ended = None in ready
                given = [message for message in ready if message is not None]
                yield Part(given, usage.prompt_tokens, usage.completion_tokens)
            await running
        finally:
            running.cancel()


def _receive(body: bytes) -> Receive:
    read = False

    async def receive() -> Message:
        nonlocal read
        if read:
            # Whoever is told that the caller is gone is told so by `run`.
            await asyncio.get_running_loop().create_future()
        read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive
