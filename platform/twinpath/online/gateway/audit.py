"""The audit log: a line of JSON for each request, written behind the requests' backs."""

import collections
import sys
import threading
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import orjson

from twinpath.online.dataplane import Ask

_BOUND = 100_000
_PAUSE_S = 0.2


class AuditLog:
    """Rule: who asked what and how it ended; never a key, a token or a row.

    Lines wait in a bounded queue for a thread that writes them; those that do not fit are
    counted, and the count is a line of its own. ``path`` None is standard output.
    """

    def __init__(self, path: Path | None, graph: str) -> None:
        self._path, self._graph = path, graph
        self._lines: collections.deque[tuple[Any, ...]] = collections.deque()
        self._dropped = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._write, name="audit log", daemon=True)
        self._thread.start()

    def admit(self, ask: Ask) -> Awaitable[None] | None:
        """Lets everything in."""
        return None

    def done(self, ask: Ask, status: int, code: str) -> None:
        """Note the request down."""
        if len(self._lines) >= _BOUND:
            self._dropped += 1
            return
        queue_s = ask.timing.queue_s if ask.timing is not None else None
        self._lines.append(
            (time.time(), time.monotonic() - ask.started_s, queue_s, ask.request_id, ask.principal,
             ask.peer, ask.transport, ask.path, status, code, ask.rows, ask.body_bytes)
        )  # fmt: skip

    def close(self) -> None:
        """Write what waits."""
        self._closed.set()
        self._thread.join(timeout=5)

    def _write(self) -> None:
        while True:
            closing = self._closed.wait(_PAUSE_S)
            if self._lines or self._dropped:
                lines = [self._lines.popleft() for _ in range(len(self._lines))]
                text = b"".join(self._line(*line) for line in lines)
                if self._dropped:
                    dropped, self._dropped = self._dropped, 0
                    text += orjson.dumps({"graph": self._graph, "dropped": dropped}) + b"\n"
                self._append(text)
            if closing:
                return

    def _append(self, text: bytes) -> None:
        if self._path is None:
            sys.stdout.write(text.decode())
            sys.stdout.flush()
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as sink:
            sink.write(text)

    def _line(
        self, at: float, took_s: float, queue_s: float | None, request_id: bytes,
        principal: str | None, peer: str, transport: str, path: str, status: int, code: str,
        rows: int, body_bytes: int,
    ) -> bytes:  # fmt: skip
        return orjson.dumps(
            {
                "time": at,
                "request_id": request_id.decode("latin-1"),
                "principal": principal,
                "peer": peer,
                "graph": self._graph,
                "transport": transport,
                "path": path,
                "status": status,
                "code": code,
                "rows": rows,
                "body_bytes": body_bytes,
                "latency_ms": round(took_s * 1000, 3),
                "queue_ms": None if queue_s is None else round(queue_s * 1000, 3),
            },
            option=orjson.OPT_APPEND_NEWLINE,
        )
