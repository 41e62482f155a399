"""``POST /features/push``: rows for the online store of the features that a graph looks up."""

import asyncio
from collections.abc import Sequence
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute, Route

from twinpath.errors import (
    BodyTooLargeError,
    ConfigError,
    EmptyBodyError,
    ForbiddenError,
    InputError,
    MalformedBodyError,
    RetryLaterError,
    TwinpathError,
)
from twinpath.graph.plan import Plan
from twinpath.nodes.features import FeatureLookup
from twinpath.online.dataplane import Ask
from twinpath.online.feature_args import PushArgs
from twinpath.online.gateway.middleware import ASK
from twinpath.online.gateway.tokens import PUSH_SCOPE as SCOPE

PATH = "/features/push"


class FeaturePush:
    """The endpoint over the repositories of a graph's lookups.

    The body is ``{"view": "…", "rows": [{…}, …]}``; see `RowCheck` for rows. The answer is 202
    once all rows are accepted, ``{"accepted": n}``. With ``"wait": true`` it comes when they are
    written, 200 and ``{"accepted": n, "written": m}``, where rows that were not newer than the
    store's count in n only; or 202 when that takes too long, and the rows are still going to be
    written. One row that does not fit refuses all (422); too many waiting rows are 503 with
    Retry-After.
    """

    def __init__(self, repos: Sequence[Any], args: PushArgs, max_body_bytes: int) -> None:
        from twinpath.features.push import Pusher

        self._pushers = [Pusher(repo, max_rows=args.max_waiting_rows) for repo in repos]
        self._args, self._max_body_bytes = args, max_body_bytes

    @property
    def routes(self) -> list[BaseRoute]:
        """The endpoint's route."""
        return [Route(PATH, self._answer, methods=["POST"])]

    async def close(self) -> None:
        """Write what waits, for a while."""
        for pusher in self._pushers:
            await asyncio.to_thread(pusher.close)

    async def _answer(self, request: Request) -> JSONResponse:
        try:
            ask: Ask | None = request.scope.get(ASK)
            self._admit(ask)
            view, rows, wait = _read(await self._body(request))
            if ask is not None:
                ask.rows = len(rows)
            return await self._push(view, rows, wait)
        except TwinpathError as error:
            return _refusal(error)

    def _admit(self, ask: Ask | None) -> None:
        if self._args.callers == "anyone":
            return
        if ask is None or ask.principal is None:
            raise ForbiddenError(
                "this graph's gateway asks nobody who they are: give it args.gateway.api_keys or "
                "jwt, or let anyone push with args.features.push.callers: anyone"
            )
        if SCOPE not in ask.scopes:
            raise ForbiddenError(f"{ask.principal!r} may not push: its key needs --graph {SCOPE}")

    async def _body(self, request: Request) -> bytes:
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > self._max_body_bytes:
                raise BodyTooLargeError(
                    f"the body has over {self._max_body_bytes} bytes: push fewer rows at a time"
                )
            parts.append(part)
        return b"".join(parts)

    async def _push(self, view: str, rows: list[Any], wait: bool) -> JSONResponse:
        try:
            pusher, checked = await asyncio.to_thread(self._check, view, rows)
        except ConfigError as error:  # a view that is not there: the caller's mistake
            raise InputError(error.message) from None
        done = pusher.offer(view, checked)
        answer = {"accepted": len(rows)}
        if not wait:
            return JSONResponse(answer, 202)
        try:
            written = await asyncio.wait_for(
                asyncio.shield(asyncio.wrap_future(done)), self._args.max_wait_s
            )
        except TimeoutError:
            return JSONResponse(answer, 202)
        return JSONResponse({**answer, "written": written}, 200)

    def _check(self, view: str, rows: list[Any]) -> tuple[Any, Any]:
        """Rows checked by the first repository that has the view."""
        for number, pusher in enumerate(self._pushers):
            try:
                return pusher, pusher.check(view, rows)
            except ConfigError:
                if number == len(self._pushers) - 1:
                    raise
        raise ConfigError("this graph has no feature repository")


def feature_push(plan: Plan, args: PushArgs | None, max_body_bytes: int) -> FeaturePush | None:
    """The endpoint of a graph; None when it looks no features up, or it is switched off."""
    from twinpath.features.repo import FeatureRepo

    given = [s.node.repo for s in plan.steps if isinstance(s.node, FeatureLookup)]
    if args is None or not given:
        return None
    distinct: list[Any] = []
    for repo in given:
        if repo not in distinct:
            distinct.append(repo)
    repos = [repo if isinstance(repo, FeatureRepo) else FeatureRepo(repo) for repo in distinct]
    return FeaturePush(repos, args, max_body_bytes)


def _read(body: bytes) -> tuple[str, list[Any], bool]:
    """View, rows and whether to wait. Raises EmptyBodyError, MalformedBodyError."""
    if not body:
        raise EmptyBodyError('no body: send {"view": "…", "rows": [{…}]}')
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise MalformedBodyError(f"the body is no JSON: {error}") from None
    if not isinstance(found, dict) or not set(found) <= {"view", "rows", "wait"}:
        raise MalformedBodyError('expected {"view": "…", "rows": [{…}]}, and "wait" if need be')
    view, rows, wait = found.get("view"), found.get("rows"), found.get("wait", False)
    if not isinstance(view, str) or not isinstance(rows, list) or not isinstance(wait, bool):
        raise MalformedBodyError(
            'expected "view" to be text, "rows" a list of objects and "wait" true or false'
        )
    return view, rows, wait


def _refusal(error: TwinpathError) -> JSONResponse:
    headers = {}
    if isinstance(error, RetryLaterError):
        headers["Retry-After"] = error.retry_after
    body = {"error": {"code": error.code, "message": error.message}}
    return JSONResponse(body, error.http_status, headers)
