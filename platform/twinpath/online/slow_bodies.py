"""Ends requests whose body does not come to its end.

HAProxy passes a body on as it comes, and neither it nor uvicorn minds how long that takes: a client
that sends a byte a minute would keep its connections, and the memory of what has come, for ever. A
timer for each request would cost more than most bodies do; so all connections of a server are
looked at now and then.
"""

import asyncio
import math
from collections.abc import Iterable
from typing import Any, Protocol

from twinpath.errors import SlowBodyError

#: Looks at all connections in the time that a body may take; it may take that much longer.
LOOKS = 4


class Bound(Protocol):
    """Knows how long a body may take."""

    @property
    def body_timeout_s(self) -> float:
        """Seconds; infinite while that is not known."""


class Reader(Protocol):
    """One connection."""

    loop: asyncio.AbstractEventLoop
    connections: set[Any]

    def unfinished(self) -> object | None:
        """The request whose body still comes, if there is one."""

    def end_slow(self, error: SlowBodyError) -> None:
        """End that request."""


class SlowBodies:
    """Watches the connections of one server while it has any."""

    def __init__(self, bound: Bound) -> None:
        self._bound = bound
        self._timer: asyncio.TimerHandle | None = None
        #: Unfinished requests of the last look, and when they were first seen.
        self._since_s: dict[object, float] = {}

    def watch(self, connection: Reader) -> None:
        """The server has one connection more."""
        if self._timer is None:
            self._look_later(connection.loop, connection.connections)

    def _look_later(self, loop: asyncio.AbstractEventLoop, connections: set[Any]) -> None:
        limit_s = self._bound.body_timeout_s
        if connections and limit_s < math.inf:
            self._timer = loop.call_later(limit_s / LOOKS, self._look, loop, connections)

    def _look(self, loop: asyncio.AbstractEventLoop, connections: set[Any]) -> None:
        self._timer = None
        now_s, limit_s = loop.time(), self._bound.body_timeout_s
        before_s, self._since_s = self._since_s, {}
        for connection in _readers(connections):
            request = connection.unfinished()
            if request is None:
                continue
            since_s = before_s.get(request, now_s)
            if now_s - since_s < limit_s:
                self._since_s[request] = since_s
                continue
            text = f"the body was not whole {limit_s:g} s after its headers"
            connection.end_slow(SlowBodyError(f"{text}: send it faster, or fewer rows"))
        self._look_later(loop, connections)


def _readers(connections: set[Any]) -> Iterable[Reader]:
    """Those among the connections that can tell; WebSockets cannot."""
    return [each for each in connections if hasattr(each, "unfinished")]
