"""The OpenAI API of a graph whose one node is an engine.

The endpoints are the engine's own (`nodes.llm_openai`); here they get this platform's gateway,
errors in OpenAI's form, and the count of what each request costs. Endpoints that are not named here
(administration, profiling, metrics) are not reached.
"""

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Callable
from typing import Any

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from twinpath.errors import (
    BodyTooLargeError,
    ClientClosedError,
    DeadlineError,
    RetryLaterError,
    TwinpathError,
)
from twinpath.graph.plan import INPUT, Plan, Step
from twinpath.nodes.llm_usage import USAGE, Usage
from twinpath.online.dataplane import Ask
from twinpath.online.exchange import Headers
from twinpath.online.frontend import Frontend
from twinpath.online.leaving import gone, run
from twinpath.online.one_by_one import OneByOne

_LOG = logging.getLogger(__name__)

#: Paths below the app's root that are the engine's.
POSTS = frozenset((
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/embeddings",
    "/v1/score", "/score", "/v1/rerank", "/rerank", "/pooling", "/classify", "/tokenize",
    "/detokenize",
))  # fmt: skip
GETS = frozenset(("/v1/models",))
#: Stored responses: reading one, and cancelling it.
_RESPONSES = "/v1/responses/"


def engine_step(plan: Plan) -> Step | None:
    """The step whose engine answers the OpenAI API: the graph's only node, if it has an engine.
    With other nodes before or behind it, requests that pass these by would not be the graph's."""
    steps = plan.steps
    if len(steps) != 1 or plan.exits or steps[0].sources != (INPUT,) or steps[0].where is not None:
        return None
    return steps[0] if hasattr(steps[0].node, "openai_app") else None


class OpenAIDoor:
    """ASGI: the engine's app behind the gateway. ``running`` counts requests under way.
    ``check_health`` raises TwinpathError when the engine is dead: its own answer to that would be
    500, which nobody tries again."""

    def __init__(
        self, app: ASGIApp, frontend: Frontend, check_health: Callable[[], None] = lambda: None
    ) -> None:
        self._app, self._frontend, self._check_health = app, frontend, check_health
        self._one_by_one = OneByOne()
        self.running = 0

    def takes(self, method: str, path: str) -> bool:
        """Whether a request, by its path below the root, is the engine's."""
        if method == "POST":
            return path in POSTS or (path.startswith(_RESPONSES) and path.endswith("/cancel"))
        return method == "GET" and (path in GETS or path.startswith(_RESPONSES))

    async def __call__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        *,
        echo_request_id: bool = False,
        cancels: bool = True,
    ) -> int:
        """Answer a request; the status of the answer. ``cancels``: whether it may be cancelled,
        beside at a deadline of its own."""
        frontend = self._frontend
        root = scope.get("root_path", "")
        path: str = scope["path"].removeprefix(root)
        headers = dict(scope["headers"])
        declared = headers.get(b"content-length", b"0")
        size = int(declared) if declared.isdigit() else 0
        peer = (scope.get("client") or ("",))[0]
        ask = frontend.ask(path, headers, size, peer)
        answer = _Answer(self._frontend, ask, send, echo_request_id)
        try:
            if frontend.gate is not None:
                pending = frontend.gate.admit(ask)
                if pending is not None:
                    await pending
            if size > frontend.max_body_bytes:
                raise _too_large(frontend.max_body_bytes)
            frontend.plane.admit()
            self._check_health()
        except TwinpathError as error:
            await answer.refuse(error)
            answer.end()
            return answer.status
        self.running += 1
        try:
            bounded = _Bounded(receive, frontend.max_body_bytes)
            if cancels or ask.deadline_s is not None:
                await self._run(functools.partial(run, self._app), scope, bounded, answer)
            else:
                # So it looks out itself for the caller's leaving while a stream is sent: Starlette
                # has two more tasks for that, and the first token waits for them.
                answer.listens_to = bounded
                asgi = {**scope.get("asgi", {}), "spec_version": "2.4"}
                await self._run(self._app, {**scope, "asgi": asgi}, bounded, answer)
        finally:
            self.running -= 1
            answer.end()
        return answer.status

    async def _run(
        self, app: ASGIApp, scope: Scope, receive: "_Bounded", answer: "_Answer"
    ) -> None:
        ask = answer.ask
        token = USAGE.set(answer.usage)
        remaining_s = None if ask.deadline_s is None else ask.deadline_s - time.monotonic()
        try:
            async with asyncio.timeout(remaining_s) as answer.limit:
                await self._one_by_one.begin()
                await app(scope, receive, answer.send)
            if receive.too_large and not answer.started:
                await answer.refuse(_too_large(receive.limit_bytes))
        except TimeoutError:
            if answer.left:
                return
            if remaining_s is None:
                raise
            await answer.fail(DeadlineError("the deadline passed before the answer was complete"))
        except Exception as error:
            _LOG.exception("request %s failed", ask.request_id.decode("latin-1"))
            if not isinstance(error, TwinpathError):
                error = TwinpathError("an unexpected error; the server's log has it")
            await answer.fail(error)
        finally:
            USAGE.reset(token)


class _Answer:
    """What is sent, and what is told of it afterwards."""

    def __init__(self, frontend: Frontend, ask: Ask, send: Send, echo_request_id: bool) -> None:
        self.ask, self.usage = ask, Usage()
        self.started = False
        self.status, self._code = ClientClosedError.http_status, ClientClosedError.code
        #: What tells of the caller's leaving, where this has to look out for it; what ends the
        #: answer then; and whether that was it.
        self.listens_to: Receive | None = None
        self.limit: asyncio.Timeout | None = None
        self.left = False
        self._listening: asyncio.Task[None] | None = None
        self._complete = False
        self._stream = False
        self._frontend, self._send, self._echo = frontend, send, echo_request_id

    async def send(self, message: Message) -> None:
        """ASGI."""
        if message["type"] == "http.response.start":
            self.started = True
            self.status = message["status"]
            self._code = "ok" if self.status < 400 else f"http_{self.status}"
            given: Headers = [*message.get("headers", ())]
            self._stream = any(
                k.lower() == b"content-type" and v.startswith(b"text/event-stream")
                for k, v in given
            )
            message = {**message, "headers": [*given, *self._more()]}
            if self._stream and self.listens_to is not None:
                self._listening = asyncio.create_task(self._listen(self.listens_to))
        elif not message.get("more_body", False):
            self._complete = True
        await self._send(message)

    async def refuse(self, error: TwinpathError) -> None:
        """Answer with an error, in OpenAI's form."""
        body = _document(error)
        headers: Headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
        ]
        if isinstance(error, RetryLaterError):
            headers.append((b"retry-after", error.retry_after.encode()))
        if error.http_status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        await self.send(
            {"type": "http.response.start", "status": error.http_status, "headers": headers}
        )
        self._code = error.code
        await self.send({"type": "http.response.body", "body": body})

    async def fail(self, error: TwinpathError) -> None:
        """End an answer that may have begun: a stream gets an event with the error."""
        if not self.started:
            await self.refuse(error)
        elif not self._complete:
            self._code = error.code
            body = b"data: " + _document(error) + b"\n\ndata: [DONE]\n\n" if self._stream else b""
            await self.send({"type": "http.response.body", "body": body})

    def end(self) -> None:
        """Tell the gateway and the metrics."""
        if self._listening is not None:
            self._listening.cancel()
        frontend, ask = self._frontend, self.ask
        if frontend.gate is not None:
            frontend.gate.spent(ask, self.usage.total_tokens)
            frontend.gate.done(ask, self.status, self._code)
        if frontend.observe is not None:
            frontend.observe(ask, self.status, time.monotonic() - ask.started_s)

    async def _listen(self, receive: Receive) -> None:
        await gone(receive)
        self.left = True
        if self.limit is not None:
            with contextlib.suppress(RuntimeError):  # it has just ended
                self.limit.reschedule(asyncio.get_running_loop().time())

    def _more(self) -> Headers:
        more = [] if self._frontend.gate is None else self._frontend.gate.headers(self.ask)
        return [*more, (b"x-request-id", self.ask.request_id)] if self._echo else more


class _Bounded:
    """``receive`` that ends a request whose body, of a length that was not declared, is too
    large."""

    def __init__(self, receive: Receive, limit_bytes: int) -> None:
        self._receive, self.limit_bytes = receive, limit_bytes
        self._size = 0
        self.too_large = False

    async def __call__(self) -> Message:
        """ASGI."""
        message = await self._receive()
        if message["type"] == "http.request":
            self._size += len(message.get("body", b""))
            if self._size > self.limit_bytes:
                self.too_large = True
                return {"type": "http.disconnect"}
        return message


def _document(error: TwinpathError) -> bytes:
    details: dict[str, Any] = {
        "message": error.message,
        "type": "invalid_request_error" if error.http_status < 500 else "server_error",
        "param": None,
        "code": error.code,
    }
    return orjson.dumps({"error": details})


def _too_large(limit_bytes: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"the body is over the limit of {limit_bytes} bytes: send less")
