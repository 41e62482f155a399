"""The audit log: a line of JSON for each request, written behind the requests' backs."""

import logging
import sys
import threading
import time
from collections.abc import Awaitable
from pathlib import Path

import msgspec

from twinpath.online.dataplane import Ask

_LOG = logging.getLogger(__name__)
_BOUND = 100_000
_PAUSE_S = 0.5
_LONGEST_PATH = 512
_NEWLINE = ord("\n")


class _Line(msgspec.Struct, gc=False):
    """One request, in the order of the line's fields; ``time`` is Unix time, seconds."""

    time: float
    request_id: str
    principal: str | None
    peer: str
    graph: str
    transport: str
    path: str
    status: int
    code: str
    rows: int
    body_bytes: int
    latency_ms: float
    queue_ms: float | None


class _Dropped(msgspec.Struct):
    time: float
    graph: str
    dropped: int


class AuditLog:
    """Rule: who asked what and how it ended; never a key, a token or a row.

    Lines wait in a bounded buffer for a thread that writes them. Those that do not fit, or cannot
    be written, are counted, and the count is a line of its own. ``path`` None is standard output.
    Lines are made at once: thousands of objects that wait would cost the requests more than that.
    """

    passive = True

    def __init__(self, path: Path | None, graph: str) -> None:
        self._path, self._graph = path, graph
        #: Whole lines, and how many.
        self._buffer, self._lines = bytearray(), 0
        self._lock = threading.Lock()
        #: Lines that did not fit, and those that could not be written.
        self._overflowed, self._unwritten = 0, 0
        #: How many of both have been told.
        self._told = 0
        self._encoder = msgspec.json.Encoder()
        self._works = True
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._write, name="audit log", daemon=True)
        self._thread.start()

    def admit(self, ask: Ask) -> Awaitable[None] | None:
        """Lets everything in."""
        return None

    def done(self, ask: Ask, status: int, code: str) -> None:
        """Note the request down."""
        if self._lines >= _BOUND:
            self._overflowed += 1
            return
        timing = ask.timing
        # Milliseconds to three digits; ``round`` takes three times as long.
        latency_us = int((time.monotonic() - ask.started_s) * 1e6 + 0.5)
        principal, peer, path = ask.principal, ask.peer, ask.path
        if len(path) > _LONGEST_PATH or not (
            path.isascii() and peer.isascii() and (principal is None or principal.isascii())
        ):
            principal, peer, path = _whole(principal, peer, path)
        line = _Line(
            time.time(),
            ask.request_id.decode("latin-1"),
            principal,
            peer,
            self._graph,
            ask.transport,
            path,
            status,
            code,
            ask.rows,
            ask.body_bytes,
            latency_us / 1e3,
            None if timing is None else int(timing.queue_s * 1e6 + 0.5) / 1e3,
        )
        with self._lock:
            buffer = self._buffer
            self._encoder.encode_into(line, buffer, -1)
            buffer.append(_NEWLINE)
            self._lines += 1

    def close(self) -> None:
        """Write what waits."""
        self._closed.set()
        self._thread.join(timeout=5)

    def _write(self) -> None:
        while True:
            closing = self._closed.wait(_PAUSE_S)
            dropped = self._overflowed + self._unwritten
            if self._lines or dropped > self._told:
                with self._lock:
                    text, count = self._buffer, self._lines
                    self._buffer, self._lines = bytearray(), 0
                self._write_once(text, count, dropped)
            if closing:
                return

    def _write_once(self, text: bytearray, count: int, dropped: int) -> None:
        if dropped > self._told:
            told = _Dropped(time.time(), self._graph, dropped - self._told)
            text += self._encoder.encode(told) + b"\n"
        try:
            self._append(text)
        except (OSError, ValueError) as error:  # ValueError: standard output is closed
            self._unwritten += count
            if self._works:
                _LOG.error("the audit log cannot be written, its lines are counted: %s", error)
            self._works = False
        else:
            self._told, self._works = dropped, True

    def _append(self, text: bytearray) -> None:
        if self._path is None:
            sys.stdout.write(text.decode())
            sys.stdout.flush()
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as sink:
            sink.write(text)


def _whole(principal: str | None, peer: str, path: str) -> tuple[str | None, str, str]:
    """Who and what, with ``?`` for what no encoding has: halves of surrogate pairs."""
    found = [
        text if text is None else text.encode("utf-8", "replace").decode()
        for text in (principal, peer, path[:_LONGEST_PATH])
    ]
    return found[0], found[1] or "", found[2] or ""
