"""The OpenAI API of a placed engine: requests go to the replica that knows their beginning.

`online.prefix_router` reads columns, so what of a request its prompt begins with is put into those.
"""

import asyncio
from contextlib import aclosing
from typing import Any

import numpy as np
import orjson
from starlette.types import Receive, Scope, Send

from twinpath.graph.columns import Columns
from twinpath.nodes.llm_usage import USAGE
from twinpath.online.engines import Wanted
from twinpath.online.handles import parts_of
from twinpath.online.leaving import gone

#: Fields of requests that prompts are made of, in the order in which they come.
_PROMPT = ("system", "instructions", "messages", "prompt", "input", "query", "text_1")
#: The field of a request that names what it shares its prompt's beginning with.
_SESSION = "prompt_cache_key"


class RemoteEngine:
    """ASGI: the engine's app in whichever replica the router of ``handle`` chooses. ``routed_by``
    is the node's; None of one whose replicas are all the same to a request."""

    def __init__(self, handle: Any, routed_by: dict[str, str | None] | None) -> None:
        self._handle = handle.options(stream=True).openai
        self._routed_by = routed_by

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; what it costs is added to `USAGE`."""
        body = await _body(receive)
        if body is None:
            return
        routed = columns(body, self._routed_by)
        relay = asyncio.create_task(self._relay(routed, Wanted(_plain(scope), body), send))
        leaves = asyncio.create_task(gone(receive))
        try:
            await asyncio.wait({relay, leaves}, return_when=asyncio.FIRST_COMPLETED)
            if relay.done():
                await relay
        finally:
            relay.cancel()
            leaves.cancel()

    async def _relay(self, routed: Columns, wanted: Wanted, send: Send) -> None:
        usage = USAGE.get()
        async with aclosing(parts_of(self._handle.remote(routed, wanted))) as parts:
            async for part in parts:
                if usage is not None:
                    usage.prompt_tokens = part.prompt_tokens
                    usage.completion_tokens = part.completion_tokens
                for message in part.messages:
                    await send(message)


def columns(body: bytes, routed_by: dict[str, str | None] | None) -> Columns:
    """One row with what the router reads: the text that a request's prompt begins with, and its
    ``prompt_cache_key`` where the node routes by session. None of a body that is no JSON object,
    which the engine refuses."""
    try:
        given = orjson.loads(body)
    except orjson.JSONDecodeError:
        given = None
    if routed_by is None or not isinstance(given, dict):
        return {}
    parts = [value for name in _PROMPT if (value := given.get(name))]
    text = "".join(p if isinstance(p, str) else orjson.dumps(p).decode() for p in parts)
    found = {str(routed_by["column"]): np.array([text], dtype=object)}
    session = given.get(_SESSION)
    if routed_by["session"] and isinstance(session, str):
        found[routed_by["session"]] = np.array([session], dtype=object)
    return found


def _plain(scope: Scope) -> dict[str, Any]:
    """What another process can be told of a scope: not the server's own state."""
    names = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string",
             "root_path", "headers", "client", "server")  # fmt: skip
    plain = {name: scope[name] for name in names if name in scope}
    return plain | {"headers": [(bytes(k), bytes(v)) for k, v in scope["headers"]]}


async def _body(receive: Receive) -> bytes | None:
    """The whole body; None when the caller hung up before its end."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return bytes(body)
