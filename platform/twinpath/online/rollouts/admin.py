"""The admin API, and feedback, as routes of a served graph.

Every admin path asks for the scope ``admin``, which only a caller has whom the gateway knows.
MLflow's webhooks are signed instead.
"""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute, Route

from twinpath.errors import (
    AccessError,
    ForbiddenError,
    InputError,
    MalformedBodyError,
    TwinpathError,
    UnknownRequestError,
    error_of,
)
from twinpath.online.dataplane import Ask
from twinpath.online.gateway.middleware import ASK
from twinpath.online.rollouts import webhook as webhooks

#: ``(operation, arguments)`` → the controller's answer.
AskController = Callable[[str, dict[str, Any]], Awaitable[dict[str, Any]]]
#: ``(request id, labels, principal)`` → what became of them; None if no replica knows the id.
JoinLabels = Callable[[bytes, list[float | None], str | None], Awaitable[dict[str, Any] | None]]
Endpoint = Callable[[Request], Awaitable[JSONResponse]]

#: Largest body, bytes.
_LARGEST = 1 << 20
_COMMANDS = ("pause", "resume", "promote", "abort", "rollback")
_MODEL_COMMANDS = ("promote", "pin", "rollback")


def routes(
    ask: AskController, join: JoinLabels, webhook_secret: Path | None = None
) -> list[BaseRoute]:
    """``/admin/models…``, ``/admin/rollouts…`` and ``/feedback``; and, where there is a file with
    their secret, MLflow's webhooks."""

    async def overview(request: Request) -> JSONResponse:
        kind = "models" if "/admin/models" in request.url.path else "rollouts"
        return await _answered(ask(kind, {}))

    async def show_model(request: Request) -> JSONResponse:
        return await _answered(ask("show", _named(request)))

    async def show_rollout(request: Request) -> JSONResponse:
        return await _answered(ask("status", _named(request)))

    async def history(request: Request) -> JSONResponse:
        return await _answered(ask("history", _named(request)))

    async def start(request: Request) -> JSONResponse:
        arguments = _named(request) | {"rollout": await _body(request)}
        return await _answered(ask("start", arguments), 201)

    async def command(request: Request) -> JSONResponse:
        name = _known(request, _COMMANDS)
        body = await _body(request, optional=True)
        return await _answered(ask(name, _named(request) | {"reason": body.get("reason", "")}))

    async def command_model(request: Request) -> JSONResponse:
        name = _known(request, _MODEL_COMMANDS)
        body = await _body(request, optional=True)
        return await _answered(ask(f"model_{name}", body | _named(request)))

    async def feedback(request: Request) -> JSONResponse:
        given = await _body(request)
        request_id, labels = _feedback(given)
        caller: Ask | None = request.scope.get(ASK)
        found = await join(request_id, labels, caller.principal if caller else None)
        if found is None:
            raise UnknownRequestError(
                f"no scores are kept for request {request_id.decode('latin-1')!r}: it was another "
                "caller's, is too long ago, or the replica that answered it has gone"
            )
        return JSONResponse(found)

    async def webhook(request: Request) -> JSONResponse:
        assert webhook_secret is not None
        body = await _read(request)
        secret = await asyncio.to_thread(webhooks.secret_of, webhook_secret)
        webhooks.verify(secret, request.headers, body)
        name = webhooks.model_of(_object(body))
        if name is None:
            return JSONResponse({"changed": None})
        return await _answered(ask("changed", {"model": name}))

    model, rollout = "/admin/models/{model}", "/admin/rollouts/{model}"
    table: list[tuple[str, str, Endpoint]] = [
        ("/admin/models", "GET", overview),
        (model, "GET", show_model),
        (model + "/{command}", "POST", command_model),
        ("/admin/rollouts", "GET", overview),
        (rollout, "GET", show_rollout),
        (rollout, "POST", start),
        (rollout + "/history", "GET", history),
        (rollout + "/{command}", "POST", command),
    ]
    guarded = [
        Route(path, _safely(_admin(endpoint)), methods=[method]) for path, method, endpoint in table
    ]
    more = [Route("/feedback", _safely(feedback), methods=["POST"])]
    if webhook_secret is not None:
        webhooks.secret_of(webhook_secret)
        more.append(Route(webhooks.PATH, _safely(webhook), methods=["POST"]))
    return [*guarded, *more]


def _admin(endpoint: Endpoint) -> Endpoint:
    async def guarded(request: Request) -> JSONResponse:
        caller: Ask | None = request.scope.get(ASK)
        if caller is None or caller.principal is None:
            raise AccessError(
                "the admin API is for known callers: set args.gateway.api_keys, and make a key "
                "with `twinpath keys new FILE --principal NAME --admin`"
            )
        if not caller.admin:
            raise ForbiddenError(f"{caller.principal!r} has no scope 'admin'")
        return await endpoint(request)

    return guarded


def _safely(endpoint: Endpoint) -> Endpoint:
    async def safe(request: Request) -> JSONResponse:
        try:
            return await endpoint(request)
        except TwinpathError as error:
            body = {"error": {"code": error.code, "message": error.message}}
            retry = {"Retry-After": "1"} if error.http_status == 503 else None
            return JSONResponse(body, error.http_status, retry)

    return safe


async def _answered(answer: Awaitable[dict[str, Any]], status: int = 200) -> JSONResponse:
    found = await answer
    failed = found.get("error")
    if failed is not None:
        raise error_of(failed["code"], failed["message"])
    return JSONResponse(found, status)


def _named(request: Request) -> dict[str, Any]:
    caller: Ask | None = request.scope.get(ASK)
    return {
        "model": request.path_params["model"],
        "by": caller.principal if caller is not None and caller.principal else "",
    }


def _known(request: Request, commands: tuple[str, ...]) -> str:
    name: str = request.path_params["command"]
    if name not in commands:
        raise InputError(f"no command {name!r} here: expected one of {', '.join(commands)}")
    return name


async def _read(request: Request) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > _LARGEST:
            raise InputError(f"the body has more than {_LARGEST} bytes")
        parts.append(part)
    return b"".join(parts)


async def _body(request: Request, *, optional: bool = False) -> dict[str, Any]:
    text = await _read(request)
    return {} if not text and optional else _object(text)


def _object(text: bytes) -> dict[str, Any]:
    try:
        found = orjson.loads(text)
    except ValueError as error:
        raise MalformedBodyError(f"the body is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise MalformedBodyError(f"the body is a JSON {type(found).__name__}: expected an object")
    return found


def _feedback(given: dict[str, Any]) -> tuple[bytes, list[float | None]]:
    """``{"request_id": "…", "labels": [0, 1, null]}``, or ``"label"`` for a request of one row."""
    request_id = given.get("request_id")
    if not isinstance(request_id, str) or not request_id or len(request_id) > 128:
        raise InputError("request_id: expected the x-request-id of the answer, a text")
    labels = given["labels"] if "labels" in given else [given.get("label")]
    if not isinstance(labels, list):
        raise InputError(f"labels: expected a list with one for each row, got {labels!r:.60}")
    for label in labels:
        if label is not None and label not in (0, 1, True, False):
            raise InputError(f"label {label!r:.60}: expected 0, 1 or null (not known)")
    return (
        request_id.encode("utf-8", "replace"),
        [None if label is None else float(label) for label in labels],
    )
