"""The ASGI app of a served graph: ``POST /<graph>/predict`` first and lean, the rest Starlette.

Nothing here knows Ray; any ASGI server can run it.
"""

import contextlib
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from urllib.parse import parse_qs

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Message, Receive, Scope, Send

import twinpath
from twinpath.errors import (
    BodyTooLargeError,
    ClientClosedError,
    InputError,
    MalformedBodyError,
    OverloadedError,
    TwinpathError,
    http_status_of,
)
from twinpath.graph.columns import Outcome, RowError
from twinpath.graph.local import after_validation
from twinpath.graph.plan import Plan
from twinpath.online import openapi
from twinpath.online.batcher import Batcher

_LOG = logging.getLogger(__name__)
_Headers = list[tuple[bytes, bytes]]


class _WrongMediaError(InputError):
    """The body's declared type is not JSON."""

    code = "unsupported_media_type"
    http_status = 415


class GraphApp:
    """The app. ``close`` is awaited at shutdown, after the last request; ``unready`` gives the
    names of nodes in other processes that are not set up yet. Rows that wait longer than
    ``queue_timeout_s`` are given up with 504. ``echo_request_id`` is off where the server around
    the app already does it, as Serve does.
    """

    def __init__(
        self,
        plan: Plan,
        batcher: Batcher,
        max_body_bytes: int,
        close: Callable[[], Awaitable[None]] | None = None,
        *,
        unready: Callable[[], Awaitable[list[str]]] | None = None,
        queue_timeout_s: float = 60.0,
        echo_request_id: bool = True,
    ) -> None:
        self._plan, self._batcher = plan, batcher
        self._max_body_bytes = max_body_bytes
        #: Paths, below the app's root, that `predict` answers.
        self.predict_paths = ("/predict", f"/{plan.graph_name}/predict")
        self._close, self._unready = close, unready
        self._queue_timeout_s, self._echo_request_id = queue_timeout_s, echo_request_id
        self._others = self._other_routes()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http" and scope["method"] == "POST":
            path: str = scope["path"]
            root: str = scope.get("root_path", "")
            if path[len(root) if path.startswith(root) else 0 :] in self.predict_paths:
                await self.predict(scope, receive, send, echo_request_id=self._echo_request_id)
                return
        echo = self._echo_request_id and scope["type"] == "http"
        await self._others(scope, receive, _with_request_id(scope, send) if echo else send)

    async def predict(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        *,
        echo_request_id: bool,
        abandoned: Callable[[], bool] | None = None,
    ) -> int:
        """Answer one POST of rows; the status that was sent (499 to a client that hung up).
        ``abandoned`` is asked before the rows are run, whether the client is gone."""
        headers: dict[bytes, bytes] = dict(scope["headers"])
        request_id = _request_id(headers)
        extra: _Headers = [(b"x-request-id", request_id)] if echo_request_id else []
        try:
            partial = _wants_partial(scope["query_string"])
            body = await self._body(headers, receive)
            if body is None:
                return ClientClosedError.http_status
            checked = self._plan.input_schema.from_json_rows(body)
            outcome = checked
            if len(checked.rows) and (partial or checked.ok):
                answered = await self._batcher.submit(
                    checked.columns, time.monotonic() + self._queue_timeout_s, abandoned
                )
                outcome = after_validation(checked, answered)
            status, document = self._answer(outcome, partial)
        except TwinpathError as error:
            status, document = error.http_status, _error(error.code, error.message)
            if isinstance(error, OverloadedError):
                extra.append((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after_s))))
            if status == 500:
                _LOG.error("request %s failed: %s", request_id.decode("latin-1"), error)
        except Exception:
            _LOG.exception("request %s failed", request_id.decode("latin-1"))
            text = "an unexpected error; the server's log has it under this request's x-request-id"
            status, document = 500, _error("internal", text)
        content = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
        extra += [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(content)).encode()),
        ]
        await send({"type": "http.response.start", "status": status, "headers": extra})
        await send({"type": "http.response.body", "body": content})
        return status

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        """The whole body; None when the client hung up. Never holds more than the limit."""
        kind = headers.get(b"content-type", b"application/json").split(b";")[0].strip().lower()
        if kind != b"application/json" and not kind.endswith(b"+json"):
            given = kind.decode("latin-1")
            raise _WrongMediaError(
                f"content-type {given!r} is not read here: send application/json"
            )
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._max_body_bytes:
            raise self._too_large(int(declared))
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part: bytes = message.get("body", b"")
            size += len(part)
            if size > self._max_body_bytes:
                raise self._too_large(size)
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)

    def _too_large(self, size: int) -> BodyTooLargeError:
        return BodyTooLargeError(
            f"the body has {size} bytes or more and the limit is {self._max_body_bytes}: "
            "send fewer rows in a request, or score them with a batch job"
        )

    def _answer(self, outcome: Outcome, partial: bool) -> tuple[int, dict[str, Any]]:
        if outcome.errors and not partial:
            first = outcome.errors[min(outcome.errors)]
            text = f"{len(outcome.errors)} of {outcome.n} rows failed; first: {first.message}"
            status = max(http_status_of(e.code) for e in outcome.errors.values())
            return status, _error(first.code, text, outcome.errors)
        rows = self._plan.output_schema.to_rows(outcome.columns)
        if not partial:
            return 200, {"rows": rows}
        spread: list[Any] = [None] * outcome.n
        for position, row in zip(outcome.rows.tolist(), rows, strict=True):
            spread[position] = row
        return 200, {"rows": spread, "errors": _row_errors(outcome.errors)}

    def _other_routes(self) -> Starlette:
        plan = self._plan
        document = openapi.describe(plan, twinpath.__version__)

        async def describe(request: Request) -> JSONResponse:
            root = request.scope.get("root_path", "")
            return JSONResponse(document | {"servers": [{"url": root or "/"}]})

        async def docs(request: Request) -> HTMLResponse:
            return HTMLResponse(openapi.page(plan.graph_name))

        async def healthy(request: Request) -> JSONResponse:
            return JSONResponse({"graph": plan.graph_name, "status": "alive"})

        async def ready(request: Request) -> JSONResponse:
            # The app exists only once every node of this process has been set up.
            missing = await self._unready() if self._unready is not None else []
            if missing:
                text = f"not set up yet: {', '.join(missing)}; ask again in a second"
                return JSONResponse(_error("not_ready", text), 503, {"Retry-After": "1"})
            return JSONResponse({"graph": plan.graph_name, "status": "ready"})

        async def not_post(request: Request) -> JSONResponse:
            raise HTTPException(405, headers={"Allow": "POST"})

        async def wrong_method(request: Request, error: Exception) -> JSONResponse:
            headers = dict(getattr(error, "headers", None) or {})
            allowed = headers.get("Allow", "GET")
            text = f"{request.method} is not allowed here: expected {allowed}"
            return JSONResponse(_error("method_not_allowed", text), 405, headers)

        async def not_found(request: Request, error: Exception) -> JSONResponse:
            known = ", ".join([f"POST /{plan.graph_name}/predict", *_PAGES])
            text = f"nothing at {request.url.path!r}; there is: {known}"
            return JSONResponse(_error("not_found", text), 404)

        @contextlib.asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            yield
            if self._close is not None:
                await self._close()

        routes = [
            *(Route(path, not_post, methods=_OTHER_METHODS) for path in self.predict_paths),
            Route("/docs", docs),
            Mount("/docs", StaticFiles(directory=openapi.assets())),
            Route("/openapi.json", describe),
            Route("/healthz", healthy),
            Route("/readyz", ready),
        ]
        return Starlette(
            routes=routes,
            lifespan=lifespan,
            exception_handlers={404: not_found, 405: wrong_method},
        )


_PAGES = ("GET /docs", "GET /openapi.json", "GET /healthz", "GET /readyz")
_OTHER_METHODS = ["GET", "PUT", "PATCH", "DELETE", "OPTIONS"]


def _request_id(headers: dict[bytes, bytes]) -> bytes:
    return headers.get(b"x-request-id") or uuid.uuid4().hex.encode()


def _with_request_id(scope: Scope, send: Send) -> Send:
    """A ``send`` that adds the request's id to the answer."""
    request_id = _request_id(dict(scope["headers"]))

    async def with_id(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
        await send(message)

    return with_id


def _wants_partial(query: bytes) -> bool:
    if not query:
        return False
    asked = parse_qs(query.decode("latin-1"))
    value = asked.get("on_error", ["fail"])[-1]
    if value not in ("fail", "partial"):
        raise MalformedBodyError(f"on_error={value!r}: expected 'fail' or 'partial'")
    return value == "partial"


def _row_errors(errors: dict[int, RowError]) -> list[dict[str, Any]]:
    return [
        {"row": i, "code": e.code, "message": e.message, "node": e.node, "field": e.field}
        for i, e in sorted(errors.items())
    ]


def _error(code: str, message: str, rows: dict[int, RowError] | None = None) -> dict[str, Any]:
    error: dict[str, Any] = {"code": code, "message": message}
    return {"error": error | ({"rows": _row_errors(rows)} if rows else {})}
