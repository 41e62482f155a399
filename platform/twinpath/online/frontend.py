"""From a whole request to its answer, whatever server reads the one and writes the other.

An exchange goes: gateway, decode, queue, run, encode. It is driven by callbacks, not by a task of
its own, because a task costs more than all the rest of a small request.
"""

import asyncio
import itertools
import logging
import os
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

from twinpath.errors import ClientClosedError, RetryLaterError, TwinpathError, http_status_of
from twinpath.graph.columns import Outcome, row_count
from twinpath.online import pins
from twinpath.online.batcher import Timing
from twinpath.online.dataplane import Ask, DataPlane
from twinpath.online.exchange import Answer, Call, Codec, Headers, Request

_LOG = logging.getLogger(__name__)
#: An id that may go into headers and logs as it is.
_VISIBLE = re.compile(rb"^[!-~]{1,128}$")
#: A request with this header is told in Server-Timing where its time went.
TIMING_HEADER = b"x-server-timing"


class Gate(Protocol):
    """What the frontend needs of a gateway."""

    def admit(self, ask: Ask) -> Awaitable[None] | None:
        """Raises TwinpathError for a request that is refused; may have to wait for I/O."""

    def admit_rows(self, ask: Ask) -> None:
        """The same once the number of rows is known."""

    def headers(self, ask: Ask) -> Headers:
        """Headers to add to the answer."""

    def done(self, ask: Ask, status: int, code: str) -> None:
        """The request was answered."""

    def spent(self, ask: Ask, tokens: int) -> None:
        """What it cost, for language models."""


class Frontend:
    """Answers requests for one data plane."""

    def __init__(
        self,
        plane: DataPlane,
        codecs: Mapping[str, Codec],
        *,
        max_body_bytes: int,
        body_timeout_s: float = 60.0,
        gate: Gate | None = None,
    ) -> None:
        self.plane, self.codecs = plane, codecs
        self.max_body_bytes, self.body_timeout_s = max_body_bytes, body_timeout_s
        self.gate = gate
        #: Whether requests of browsers have to pass the app's CORS middleware.
        self.cors = False
        #: Told of every request, the status of its answer and its seconds, for metrics.
        self.observe: Callable[[Ask, int, float], None] | None = None
        #: Told of outcomes, for what nodes noted of them; see `tell`.
        self.remember: Callable[[Ask, Outcome], None] | None = None
        self._ids = itertools.count()
        self._id_prefix = os.urandom(6).hex().encode()
        #: Exchanges that wait for the gateway; a task needs somebody who holds it.
        self.waiting: set[asyncio.Task[None]] = set()

    def tell(self, of_outcome: Callable[[Ask, Outcome], None]) -> None:
        """Have one more told of outcomes, also of those that nobody waits for any more."""
        before = self.remember

        def both(ask: Ask, outcome: Outcome) -> None:
            assert before is not None
            before(ask, outcome)
            of_outcome(ask, outcome)

        self.remember = of_outcome if before is None else both

    def codec(self, path: str) -> Codec | None:
        """The codec of a path below the app's root; where versions may be asked for, of the path
        without its version, too."""
        if self.plane.pinnable:
            return pins.at(self.codecs, path)
        return self.codecs.get(path)

    def ask(self, path: str, headers: Mapping[bytes, bytes], body_bytes: int, peer: str) -> Ask:
        """What the gateway's rules see of a request over HTTP."""
        request_id = headers.get(b"x-request-id")
        if request_id is None or not _VISIBLE.match(request_id):
            request_id = b"%b%08x" % (self._id_prefix, next(self._ids))
        return Ask(
            graph=self.plane.name,
            headers=headers,
            peer=peer,
            path=path,
            body_bytes=body_bytes,
            request_id=request_id,
        )

    def begin(
        self,
        codec: Codec,
        request: Request,
        ask: Ask,
        reply: Callable[[Answer], None],
    ) -> "Exchange":
        """Answer a request: ``reply`` is called once, now or later, on this event loop."""
        exchange = Exchange(self, codec, request, ask, reply)
        exchange.begin()
        return exchange


class Exchange:
    """One request under way."""

    __slots__ = ("_ask", "_call", "_codec", "_decode_s", "_frontend", "_over", "_reply",
                 "_request", "_ticket")  # fmt: skip

    def __init__(
        self,
        frontend: Frontend,
        codec: Codec,
        request: Request,
        ask: Ask,
        reply: Callable[[Answer], None],
    ) -> None:
        self._frontend, self._codec, self._request, self._ask = frontend, codec, request, ask
        self._reply = reply
        self._call: Call | None = None
        self._ticket: int | None = None
        self._decode_s = 0.0
        self._over = False

    def begin(self) -> None:
        """Pass the gateway, decode and queue."""
        gate = self._frontend.gate
        if gate is not None:
            try:
                pending = gate.admit(self._ask)
            except Exception as error:
                self._refuse(error)
                return
            if pending is not None:
                task = asyncio.get_running_loop().create_task(self._when(pending))
                self._frontend.waiting.add(task)
                task.add_done_callback(self._frontend.waiting.discard)
                return
        self._admitted()

    def give_up(self) -> None:
        """The client hung up: rows that still wait are not run, and nothing is replied."""
        if self._ticket is not None:
            self._frontend.plane.give_up(self._ticket)
        self._finish(Answer(ClientClosedError.http_status, b""), ClientClosedError.code, None)

    async def _when(self, pending: Awaitable[None]) -> None:
        try:
            await pending
        except Exception as error:
            self._refuse(error)
        else:
            if not self._over:  # the client may have hung up
                self._admitted()

    def _admitted(self) -> None:
        frontend, ask = self._frontend, self._ask
        started_s = time.monotonic()
        try:
            call = self._codec.decode(self._request)
            self._decode_s = time.monotonic() - started_s
            if isinstance(call, Answer):
                self._finish(call, "answered", None)
                return
            ask.rows = row_count(call.columns)
            if call.timeout_s is not None:
                asked_s = ask.started_s + call.timeout_s
                ask.deadline_s = min(ask.deadline_s or asked_s, asked_s)
            if call.priority is not None:
                ask.priority = min(ask.max_priority, call.priority)
            if frontend.plane.pinnable:
                request = self._request
                ask.version = call.version or pins.asked(request.path, request.headers)
            if frontend.gate is not None:
                frontend.gate.admit_rows(ask)
            self._call = call
            self._ticket = frontend.plane.start(call.columns, ask, self._ran)
        except Exception as error:
            self._refuse(error)

    def _ran(self, result: Outcome | Exception, timing: Timing | None) -> None:
        if isinstance(result, Exception):
            if not self._over:
                self._ask.timing = timing
                self._refuse(result)
            return
        started_s = time.monotonic()
        if self._frontend.remember is not None:
            self._frontend.remember(self._ask, result)
        if self._over:
            return
        self._ask.timing = timing
        assert self._call is not None
        try:
            answer = self._call.encode(result)
        except Exception as error:
            self._refuse(error)
            return
        if result.remarks:
            answer.headers += [
                (b"x-" + subject.encode(), text.encode())
                for subject, text in result.remarks.items()
            ]
        code = "ok" if answer.status < 400 else "row_failed"
        if answer.status in (429, 503):
            # Of rows: what a node could not do for now.
            answer.headers.append((b"retry-after", b"1"))
            codes = (error.code for error in result.errors.values())
            code = max(codes, key=http_status_of, default=code)
        self._finish(answer, code, timing, time.monotonic() - started_s)

    def _refuse(self, error: Exception) -> None:
        request_id = self._ask.request_id.decode("latin-1")
        if not isinstance(error, TwinpathError):
            _LOG.error("request %s failed", request_id, exc_info=error)
            error = TwinpathError(
                "an unexpected error; the server's log has it under this request's x-request-id"
            )
        elif error.http_status == 500:
            _LOG.error("request %s failed: %s", request_id, error)
        answer = self._codec.refuse(error)
        if isinstance(error, RetryLaterError):
            answer.headers.append((b"retry-after", error.retry_after.encode()))
        if answer.status == 401:
            answer.headers.append((b"www-authenticate", b"Bearer"))
        self._finish(answer, error.code, self._ask.timing)

    def _finish(
        self, answer: Answer, code: str, timing: Timing | None, encode_s: float = 0.0
    ) -> None:
        if self._over:
            return
        self._over = True
        frontend, ask = self._frontend, self._ask
        total_s = time.monotonic() - ask.started_s
        frontend.plane.statistics.request(
            ask.rows, timing, total_s, answer.status < 400, self._decode_s, encode_s
        )
        if frontend.gate is not None:
            answer.headers += frontend.gate.headers(ask)
            frontend.gate.done(ask, answer.status, code)
        if frontend.observe is not None:
            frontend.observe(ask, answer.status, total_s)
        if TIMING_HEADER in ask.headers:
            answer.headers.append(
                (b"server-timing", _server_timing(timing, total_s, self._decode_s, encode_s))
            )
        self._reply(answer)


def _server_timing(
    timing: Timing | None, total_s: float, decode_s: float, encode_s: float
) -> bytes:
    """Server-Timing (W3C), durations in milliseconds."""
    parts = [f"decode;dur={decode_s * 1000:.3f}"]
    if timing is not None:
        parts.append(f"queue;dur={timing.queue_s * 1000:.3f}")
        parts.append(f'run;dur={timing.run_s * 1000:.3f};desc="batch of {timing.batch_rows} rows"')
        parts += [f"node-{name};dur={s * 1000:.3f}" for name, s in timing.nodes_s.items()]
    parts += [f"encode;dur={encode_s * 1000:.3f}", f"total;dur={total_s * 1000:.3f}"]
    return ", ".join(parts).encode()
