"""An HTTP protocol for uvicorn that answers inference requests without ASGI.

ASGI costs a scope, a task, an event and several messages for each request, which is more than a
batched model does. `LeanProtocol` is uvicorn's own httptools protocol with one shortcut: a POST to
a path of the door, with a known length, is collected and answered by callbacks. Everything else
(other paths, chunked bodies, pipelined requests, upgrades) takes uvicorn's way unchanged, so
parsing, keep-alive, flow control and shutdown remain uvicorn's.
"""

import asyncio
import json
import math
from collections.abc import Mapping
from typing import Any, Protocol

from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from twinpath.errors import SlowBodyError
from twinpath.online.exchange import Answer, Call, Codec, Request
from twinpath.online.frontend import Exchange
from twinpath.online.slow_bodies import SlowBodies

#: Requests with one of these headers need more than the short way offers.
_LONG_WAY = frozenset((b"transfer-encoding", b"upgrade", b"expect"))


class Door(Protocol):
    """Where lean requests go in. The app that uvicorn runs, or one that it wraps (its attribute
    ``app``), has it as attribute ``door``."""

    #: Ends requests, of any way, whose body does not come.
    slow_bodies: SlowBodies

    @property
    def max_body_bytes(self) -> int:
        """Longer bodies take the long way."""

    def codec(self, url: bytes, headers: Mapping[bytes, bytes]) -> Codec | None:
        """The codec for a POST to this URL, if it may take the short way."""

    def enter(self, cycle: "LeanCycle") -> None:
        """Answer a complete request through ``cycle.reply``, now or later."""


class _Nobody:
    """Stands for the event by which uvicorn wakes ASGI apps; nobody waits for a lean request."""

    @staticmethod
    def set() -> None:
        """Nothing to wake."""


class LeanCycle:
    """One lean request. It has what uvicorn's protocol reads of its own cycles."""

    __slots__ = (
        "body", "codec", "disconnected", "exchange", "headers", "keep_alive", "protocol",
        "response_complete", "url",
    )  # fmt: skip
    message_event = _Nobody

    def __init__(
        self,
        protocol: "LeanProtocol",
        codec: Codec,
        url: bytes,
        headers: dict[bytes, bytes],
        keep_alive: bool,
    ) -> None:
        self.protocol, self.codec = protocol, codec
        self.url, self.headers, self.keep_alive = url, headers, keep_alive
        self.body: bytes | bytearray = b""
        #: What is under way for it; None before, and once it is answered.
        self.exchange: Exchange | None = None
        self.disconnected = False
        self.response_complete = False

    def reply(self, answer: Answer) -> None:
        """Write the answer; harmless when the client is gone or has its answer."""
        self.exchange = None
        if not self.response_complete and not self.disconnected:
            self.protocol.write(answer, self)


class LeanProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 protocol, with the short way for requests that the door takes."""

    def __init__(self, *args: Any, **kw: Any) -> None:
        super().__init__(*args, **kw)
        self._door = _door(self.config.loaded_app)
        self._lean: LeanCycle | None = None
        #: The lean request that runs while uvicorn holds pipelined ones back.
        self._before: LeanCycle | None = None
        #: Whether the body of a request that went the long way is still coming.
        self._reading = False
        self._dated: tuple[Any, bytes] = (None, b"")
        #: When the last lean answer was written, on the loop's clock; infinite since a request
        #: began. One timer looks at it now and then: one for each answer would cost more.
        self._idle_from_s = math.inf
        self._idle_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """asyncio: a client came."""
        super().connection_made(transport)
        if self._door is not None:
            self._door.slow_bodies.watch(self)

    def on_message_begin(self) -> None:
        """httptools: a request starts. The ASGI scope is made only when one is needed."""
        self.url = b""
        self.headers = []
        self.expect_100_continue = False
        self._idle_from_s = math.inf

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio: the client is gone."""
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        super().connection_lost(exc)
        for cycle in (self._before, self.cycle):
            if isinstance(cycle, LeanCycle) and cycle.exchange is not None:
                # Its rows leave the queue now, not when their turn comes: a queue that is full of
                # what nobody waits for would refuse those who do.
                cycle.disconnected = True
                cycle.exchange.give_up()
        # Requests know the connection: together they would wait for garbage collection, which
        # replicas do seldom, with all the buffers of a connection.
        self.cycle = self._lean = self._before = None  # type: ignore[assignment]
        self.pipeline.clear()

    def on_headers_complete(self) -> None:
        """httptools: the way of the request is chosen here."""
        self._lean = self._short_way()
        if self._lean is not None:
            self.cycle = self._lean  # type: ignore[assignment]  # it has all that is read
            return
        self._reading = True
        before: object = self.cycle
        if isinstance(before, LeanCycle):
            self._before = before
        url, headers, expects = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expects
        self.headers.extend(headers)  # the list that the scope has, too
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """httptools: a piece of the body."""
        lean = self._lean
        if lean is None:
            super().on_body(body)
        elif lean.body:
            if isinstance(lean.body, bytes):
                lean.body = bytearray(lean.body)
            lean.body += body
        else:
            lean.body = body

    def on_message_complete(self) -> None:
        """httptools: the request is whole."""
        lean, self._lean = self._lean, None
        if lean is None:
            self._reading = False
            super().on_message_complete()
        elif self._door is not None:
            self._door.enter(lean)

    def write(self, answer: Answer, cycle: LeanCycle | RequestResponseCycle) -> None:
        """Send an answer and be ready for the next request of this connection."""
        body = answer.body
        parts = [
            STATUS_LINE[answer.status],
            self._default_headers(),
            b"content-type: ", answer.media, b"\r\ncontent-length: %d\r\n" % len(body),
        ]  # fmt: skip
        for name, value in answer.headers:
            parts += (name, b": ", value, b"\r\n")
        parts.append(b"\r\n" if cycle.keep_alive else b"connection: close\r\n\r\n")
        parts.append(body)
        cycle.response_complete = True
        self.transport.write(b"".join(parts))
        if not cycle.keep_alive:
            self.transport.close()
        if self.pipeline or self.flow.read_paused or self.transport.is_closing():
            self.on_response_complete()  # uvicorn's way
            return
        self.server_state.total_requests += 1
        self._idle_from_s = self.loop.time()
        if self._idle_timer is None:
            self._idle_timer = self.loop.call_later(self.timeout_keep_alive, self._look_if_idle)

    def unfinished(self) -> object | None:
        """The request whose body the client still sends. Not one that is held back, by the app or
        by those before it on this connection."""
        if self._lean is not None:
            return self._lean
        if not self._reading or self.flow.read_paused or self.pipeline:
            return None
        # An answer may come before the body's end, and the client send on after it.
        answering = self.cycle.response_started and not self.cycle.response_complete
        return None if answering else self.cycle

    def end_slow(self, error: SlowBodyError) -> None:
        """Answer the unfinished request with 408, and hang up."""
        lean, self._lean = self._lean, None
        if lean is not None and self._door is not None:
            lean.keep_alive, lean.codec = False, _Refusing(lean.codec, error)
            self._door.enter(lean)  # which has it counted
            return
        cycle = self.cycle
        if cycle.response_complete:
            self.transport.close()
            return
        cycle.disconnected, cycle.keep_alive = True, False
        cycle.message_event.set()  # the app learns that the client is gone
        text = {"error": {"code": error.code, "message": error.message}}
        self.write(Answer(error.http_status, json.dumps(text).encode()), cycle)

    def _look_if_idle(self) -> None:
        """Close the connection if nothing came since the last answer for as long as is allowed;
        one that a request came on since is looked at again after its answer."""
        self._idle_timer = None
        rest_s = self._idle_from_s + self.timeout_keep_alive - self.loop.time()
        if rest_s <= 0:
            self.transport.close()
        elif rest_s < math.inf:
            self._idle_timer = self.loop.call_later(rest_s, self._look_if_idle)

    def _short_way(self) -> LeanCycle | None:
        door = self._door
        if door is None or self.parser.get_method() != b"POST":
            return None
        if self.cycle is not None and not self.cycle.response_complete:
            return None  # pipelined: uvicorn keeps the order
        headers = dict(self.headers)
        codec = door.codec(self.url, headers)
        length = headers.get(b"content-length", b"")
        if (
            codec is None
            or not length.isdigit()
            or int(length) > door.max_body_bytes
            or not _LONG_WAY.isdisjoint(headers)
        ):
            return None
        http_1_0 = self.parser.get_http_version() == "1.0"
        keep_alive = not http_1_0 and self.parser.should_keep_alive()
        return LeanCycle(self, codec, self.url, headers, keep_alive)

    def _default_headers(self) -> bytes:
        """uvicorn's Server and Date, which it makes anew every second."""
        given = self.server_state.default_headers
        if self._dated[0] is not given:
            rendered = b"".join(b"%s: %s\r\n" % pair for pair in given)
            self._dated = (given, rendered)
        return self._dated[1]


class _Refusing:
    """A codec that refuses what it is given."""

    def __init__(self, codec: Codec, error: SlowBodyError) -> None:
        self.refuse, self._error = codec.refuse, error

    def decode(self, request: Request) -> Call | Answer:
        """Raises the error."""
        raise self._error


def _door(app: Any) -> Door | None:
    """The door of an app, or of the app that it wraps."""
    while app is not None:
        door: Door | None = getattr(app, "door", None)
        if door is not None:
            return door
        app = getattr(app, "app", None)
    return None
