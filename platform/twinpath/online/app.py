"""The ASGI app of a served graph: every protocol's inference endpoints, and the pages beside them.

Nothing here knows Ray; any ASGI server can run it.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as StarletteRequest
from starlette.responses import HTMLResponse, JSONResponse
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import twinpath
from twinpath.errors import BodyTooLargeError
from twinpath.graph.plan import Plan
from twinpath.nodes.llm_memory import is_engine
from twinpath.nodes.llm_usage import tokens_of
from twinpath.online import openapi, protocols
from twinpath.online.batcher import Batcher
from twinpath.online.dataplane import Ask, DataPlane
from twinpath.online.exchange import Answer, Codec, Headers, Refused, Request
from twinpath.online.feature_args import PushArgs
from twinpath.online.feature_push import feature_push
from twinpath.online.frontend import Frontend
from twinpath.online.gateway.args import CorsArgs, GatewayArgs
from twinpath.online.gateway.build import build
from twinpath.online.gateway.middleware import Guarded
from twinpath.online.protocols.openai import OpenAIDoor


class GraphApp:
    """The app. ``routes`` are the protocols' own beside inference; ``close`` is awaited at
    shutdown, after the last request. ``cors`` is about browsers of other origins.
    ``echo_request_id`` is off where the server around the app already does it, as Serve does.
    """

    def __init__(
        self,
        frontend: Frontend,
        routes: Sequence[BaseRoute] = (),
        close: Callable[[], Awaitable[None]] | None = None,
        *,
        cors: CorsArgs | None = None,
        echo_request_id: bool = True,
    ) -> None:
        self.frontend = frontend
        self._plane = frontend.plane
        self._close, self._echo_request_id = close, echo_request_id
        #: The OpenAI API, where the graph is an engine.
        self.openai: OpenAIDoor | None = None
        self._others: ASGIApp = self._other_routes(routes)
        if frontend.gate is not None:
            self._others = Guarded(self._others, frontend.gate, self._ask)
        self._entry: ASGIApp = self._handle
        if cors is not None:
            frontend.cors = True
            self._entry = CORSMiddleware(
                self._handle,
                allow_origins=cors.allow_origins,
                allow_methods=cors.allow_methods,
                allow_headers=cors.allow_headers,
                expose_headers=cors.expose_headers,
                allow_credentials=cors.allow_credentials,
                max_age=cors.max_age_s,
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        await self._entry(scope, receive, send)

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._others(scope, receive, send)
            return
        path: str = scope["path"]
        root: str = scope.get("root_path", "")
        path = path[len(root) if path.startswith(root) else 0 :]
        if self.openai is not None and self.openai.takes(scope["method"], path):
            await self.openai(scope, receive, send, echo_request_id=self._echo_request_id)
            return
        if scope["method"] == "POST":
            codec = self.frontend.codec(path)
            if codec is not None:
                await self._infer(codec, scope, receive, send)
                return
        if self._echo_request_id:
            send = _with(self._ask(scope).request_id, send)
        await self._others(scope, receive, send)

    def _ask(self, scope: Scope) -> Ask:
        peer = (scope.get("client") or ("",))[0]
        return self.frontend.ask(scope["path"], dict(scope["headers"]), 0, peer)

    async def _infer(self, codec: Codec, scope: Scope, receive: Receive, send: Send) -> None:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        peer = (scope.get("client") or ("",))[0]
        extra: Headers = []
        try:
            body = await self._body(headers, receive)
        except BodyTooLargeError as error:
            codec, body = Refused(codec, error), b""
        if body is None:
            return
        size = len(body) or _declared(headers)
        ask = self.frontend.ask(scope["path"], headers, size, peer)
        if self._echo_request_id:
            extra.append((b"x-request-id", ask.request_id))
        request = Request(scope["path"], scope["query_string"], headers, body)
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        exchange = self.frontend.begin(
            codec, request, ask, lambda a: None if future.done() else future.set_result(a)
        )
        try:
            answer = await future
        except asyncio.CancelledError:
            exchange.give_up()
            raise
        extra += [
            (b"content-type", answer.media),
            (b"content-length", b"%d" % len(answer.body)),
            *answer.headers,
        ]
        await send({"type": "http.response.start", "status": answer.status, "headers": extra})
        await send({"type": "http.response.body", "body": answer.body})

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        """The whole body; None when the client hung up. Never holds more than the limit."""
        declared, limit_bytes = _declared(headers), self.frontend.max_body_bytes
        if declared > limit_bytes:
            raise too_large(declared, limit_bytes)
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part: bytes = message.get("body", b"")
            size += len(part)
            if size > limit_bytes:
                raise too_large(size, limit_bytes)
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)

    def _other_routes(self, routes: Sequence[BaseRoute]) -> Starlette:
        plane = self._plane
        routed = [getattr(route, "path", "") for route in routes]
        document = openapi.describe(
            plane.plan, twinpath.__version__, plane.metadata.versions, routed
        )

        async def describe(request: StarletteRequest) -> JSONResponse:
            root = request.scope.get("root_path", "")
            return JSONResponse(document | {"servers": [{"url": root or "/"}]})

        async def docs(request: StarletteRequest) -> HTMLResponse:
            return HTMLResponse(openapi.page(plane.name))

        async def healthy(request: StarletteRequest) -> JSONResponse:
            return JSONResponse({"graph": plane.name, "status": "alive"})

        async def ready(request: StarletteRequest) -> JSONResponse:
            # The app exists only once every node of this process has been set up.
            missing = await plane.ready()
            if missing:
                text = f"not set up yet: {', '.join(missing)}; ask again in a second"
                return JSONResponse(_error("not_ready", text), 503, {"Retry-After": "1"})
            notes = plane.notes()
            document: dict[str, Any] = {"graph": plane.name, "status": "ready"}
            return JSONResponse(document | {"notes": notes} if notes else document)

        async def not_post(request: StarletteRequest) -> JSONResponse:
            raise HTTPException(405, headers={"Allow": "POST"})

        async def wrong_method(request: StarletteRequest, error: Exception) -> JSONResponse:
            headers = dict(getattr(error, "headers", None) or {})
            allowed = headers.get("Allow", "GET")
            text = f"{request.method} is not allowed here: expected {allowed}"
            return JSONResponse(_error("method_not_allowed", text), 405, headers)

        async def not_found(request: StarletteRequest, error: Exception) -> JSONResponse:
            known = ", ".join([f"POST /{plane.name}/predict", *_PAGES])
            text = f"nothing at {request.url.path!r}; there is: {known}"
            return JSONResponse(_error("not_found", text), 404)

        @contextlib.asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            yield
            if self._close is not None:
                await self._close()

        every = [
            *routes,
            *(Route(path, not_post, methods=_OTHER_METHODS) for path in self.frontend.codecs),
            Route("/docs", docs),
            Mount("/docs", StaticFiles(directory=openapi.assets())),
            Route("/openapi.json", describe),
            Route("/healthz", healthy),
            Route("/readyz", ready),
        ]
        return Starlette(
            routes=every,
            lifespan=lifespan,
            exception_handlers={404: not_found, 405: wrong_method},
        )


def graph_app(
    plan: Plan,
    batcher: Batcher,
    *,
    max_body_bytes: int,
    body_timeout_s: float = 60.0,
    gateway: GatewayArgs | None = None,
    version: str = "1",
    unready: Callable[[], Awaitable[list[str]]] | None = None,
    queue_timeout_s: float = 60.0,
    close: Callable[[], Awaitable[None]] | None = None,
    echo_request_id: bool = True,
    push: PushArgs | None = None,
    more_routes: Sequence[BaseRoute] = (),
) -> GraphApp:
    """The app of a plan with every protocol; see `DataPlane`, `Frontend` and `GraphApp`. Without
    ``gateway`` no rule is applied; without ``push`` no features can be pushed. ``more_routes`` are
    behind the gateway as all others."""
    plane = DataPlane(
        plan, batcher, version=version, unready=unready, queue_timeout_s=queue_timeout_s
    )
    gate = None if gateway is None else build(gateway, plan.graph_name)

    pushing = feature_push(plan, push, max_body_bytes)

    async def end() -> None:
        if close is not None:
            await close()
        if pushing is not None:
            await pushing.close()
        if gate is not None:
            await asyncio.to_thread(gate.close)

    frontend = Frontend(
        plane,
        protocols.codecs(plane),
        max_body_bytes=max_body_bytes,
        body_timeout_s=body_timeout_s,
        gate=gate,
    )
    if gate is not None and any(is_engine(step.node) for step in plan.steps):
        frontend.tell(lambda ask, outcome: gate.spent(ask, tokens_of(outcome)))
    return GraphApp(
        frontend,
        [
            *protocols.routes(plane),
            *more_routes,
            *(pushing.routes if pushing is not None else ()),
        ],
        end,
        cors=gateway.cors if gateway is not None else None,
        echo_request_id=echo_request_id,
    )


_PAGES = ("GET /docs", "GET /openapi.json", "GET /healthz", "GET /readyz")
_OTHER_METHODS = ["GET", "PUT", "PATCH", "DELETE", "OPTIONS"]


def too_large(size: int, limit_bytes: int) -> BodyTooLargeError:
    """The error for a body of ``size`` bytes or more."""
    return BodyTooLargeError(
        f"the body has {size} bytes or more and the limit is {limit_bytes}: "
        "send fewer rows in a request, or score them with a batch job"
    )


def _declared(headers: dict[bytes, bytes]) -> int:
    """The length of the body as the headers have it; 0 if they do not say."""
    declared = headers.get(b"content-length", b"0")
    return int(declared) if declared.isdigit() else 0


def _with(request_id: bytes, send: Send) -> Send:
    """A ``send`` that adds the request's id to the answer."""

    async def with_id(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
        await send(message)

    return with_id


def _error(code: str, message: str) -> dict[str, Any]:
    return {"error": {"code": code, "message": message}}
