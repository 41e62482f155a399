"""Triton's generate extension, streamed: ``POST /v2/models/NAME/generate_stream``.

https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_generate.md:
a JSON object with the inputs of one row in, server-sent events with a JSON object of the outputs
out, one for each part of the answer. An error before the first part is an ordinary answer with its
status; a later one is an event ``{"error": …}``, as there; so is a deadline that passes.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from twinpath.errors import (
    BodyTooLargeError,
    ClientClosedError,
    DeadlineError,
    InputError,
    MalformedBodyError,
    RetryLaterError,
    TwinpathError,
    error_of,
)
from twinpath.graph.columns import Columns, Outcome, Rows
from twinpath.graph.context import DEADLINE_S
from twinpath.graph.plan import Plan
from twinpath.graph.streaming import StreamingExecutor, first_row, streaming_steps
from twinpath.nodes.llm_usage import tokens_noted
from twinpath.online.gateway.middleware import ASK, SPENT
from twinpath.online.leaving import gone

Notes = dict[str, tuple[Rows, Columns]]


def stream_routes(
    plan: Plan,
    executor: StreamingExecutor,
    max_body_bytes: int,
    admit: Callable[[], None] = lambda: None,
) -> list[Route]:
    """The route of a graph that can be streamed; none for others. ``admit`` raises TwinpathError
    for a request that is not to be answered now."""
    if streaming_steps(plan) is None:
        return []

    async def generate_stream(request: Request) -> Response:
        spent = request.scope.get(SPENT, lambda tokens: None)
        ask = request.scope.get(ASK)
        deadline_s = None if ask is None else ask.deadline_s
        DEADLINE_S.set(deadline_s)
        notes: Notes = {}
        try:
            columns = _row(plan, await _body(request, max_body_bytes))
            admit()
            parts = executor.stream(columns, notes)
            first = await _first(parts, request, deadline_s)
        except TwinpathError as error:
            spent(tokens_noted(notes))
            headers = (
                {"retry-after": error.retry_after} if isinstance(error, RetryLaterError) else None
            )
            return JSONResponse(_error(error), error.http_status, headers)
        answer = _events(first, parts, deadline_s, lambda: spent(tokens_noted(notes)))
        return StreamingResponse(answer, media_type="text/event-stream")

    path = f"/v2/models/{plan.graph_name}/generate_stream"
    return [Route(path, generate_stream, methods=["POST"])]


async def _next(parts: Any, deadline_s: float | None) -> Outcome | None:
    """The next part; None after the last one. Raises DeadlineError, and what makes the parts."""
    try:
        # An event loop's clock and time.monotonic are the same one.
        async with asyncio.timeout_at(deadline_s) as limit:
            part: Outcome | None = await anext(parts, None)
            return part
    except TimeoutError:
        if not limit.expired():
            raise
        raise DeadlineError("the deadline passed before the answer was complete") from None


async def _first(parts: Any, request: Request, deadline_s: float | None) -> Outcome | None:
    """The first part. Raises ClientClosedError when the caller leaves before."""
    asking = asyncio.ensure_future(_next(parts, deadline_s))
    leaving = asyncio.ensure_future(gone(request.receive))
    try:
        await asyncio.wait({asking, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if asking.done():
            return asking.result()
    finally:
        leaving.cancel()
        if asking.cancel():
            await asyncio.gather(asking, return_exceptions=True)
    raise ClientClosedError("the caller left before the first part of the answer")


async def _events(
    first: Outcome | None, parts: Any, deadline_s: float | None, ended: Callable[[], None]
) -> AsyncIterator[bytes]:
    part = first
    try:
        async with aclosing(parts):
            while part is not None:
                yield _event(first_row(part.columns))
                part = await _next(parts, deadline_s)
    except TwinpathError as error:
        yield _event(_error(error))
    finally:
        ended()


async def _body(request: Request, limit_bytes: int) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit_bytes:
            raise BodyTooLargeError(f"the body is over the limit of {limit_bytes} bytes: send less")
    return bytes(body)


def _row(plan: Plan, body: bytes) -> Columns:
    try:
        row = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise MalformedBodyError(f"the body is no JSON: {error}") from None
    if not isinstance(row, dict):
        raise InputError(f"expected a JSON object with one row's inputs, got {type(row).__name__}")
    checked = plan.input_schema.from_rows([row])
    if checked.errors:
        raise error_of(checked.errors[0].code, checked.errors[0].message)
    return checked.columns


def _event(document: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(document) + b"\n\n"


def _error(error: TwinpathError) -> dict[str, Any]:
    return {"error": error.message, "code": error.code}
