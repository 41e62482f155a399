"""The gateway around any ASGI app: the pages and metadata beside inference."""

import functools
from collections.abc import Callable

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from twinpath.errors import ClientClosedError, RetryLaterError, TwinpathError
from twinpath.online.dataplane import Ask
from twinpath.online.exchange import Headers
from twinpath.online.frontend import Gate

#: Probes have no credentials; these say nothing but whether the server is there. A registry's
#: webhook has a signature instead (`online.rollouts.webhook`).
OPEN_PATHS = (
    "/", "/healthz", "/readyz", "/ping", "/health", "/v2/health/live", "/v2/health/ready",
    "/registry/webhook",
)  # fmt: skip

#: Key of the ASGI scope under which routes find the `Ask` that the gateway let in.
ASK = "twinpath.ask"
#: And under which what to call with the tokens that the request cost.
SPENT = "twinpath.spent"


class Guarded:
    """ASGI middleware: a request that the gateway refuses does not reach the app."""

    def __init__(self, app: ASGIApp, gate: Gate, ask: Callable[[Scope], Ask]) -> None:
        self._app, self._gate, self._ask = app, gate, ask

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        root = scope.get("root_path", "")
        path = scope.get("path", "")
        path = path[len(root) :] if path.startswith(root) else path
        if scope["type"] != "http" or path in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        ask = self._ask(scope)
        try:
            pending = self._gate.admit(ask)
            if pending is not None:
                await pending
        except TwinpathError as error:
            await _refuse(error, self._gate.headers(ask), send)
            self._gate.done(ask, error.http_status, error.code)
            return
        spent = functools.partial(self._gate.spent, ask)
        await self._pass_on(ask, {**scope, ASK: ask, SPENT: spent}, receive, send)

    async def _pass_on(self, ask: Ask, scope: Scope, receive: Receive, send: Send) -> None:
        status, code = ClientClosedError.http_status, ClientClosedError.code

        async def watched(message: Message) -> None:
            nonlocal status, code
            if message["type"] == "http.response.start":
                status = message["status"]
                code = "ok" if status < 400 else f"http_{status}"
                more = self._gate.headers(ask)
                message = {**message, "headers": [*message.get("headers", ()), *more]}
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:
            status, code = TwinpathError.http_status, TwinpathError.code
            raise
        finally:
            self._gate.done(ask, status, code)


async def _refuse(error: TwinpathError, more: Headers, send: Send) -> None:
    body = orjson.dumps({"error": {"code": error.code, "message": error.message}})
    headers: Headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        *more,
    ]
    if isinstance(error, RetryLaterError):
        headers.append((b"retry-after", error.retry_after.encode()))
    if error.http_status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": error.http_status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
