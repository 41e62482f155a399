"""Open Inference Protocol v2 over REST: everything beside inference.

Health, metadata, and Triton's extensions for statistics and the model repository.
"""

from collections.abc import Awaitable, Callable

import orjson
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

import twinpath
from twinpath.errors import MalformedBodyError, TwinpathError
from twinpath.online.dataplane import DataPlane
from twinpath.online.protocols.oip_rest import inference as inference
from twinpath.online.protocols.oip_rest import metadata

EXTENSIONS = ["binary_tensor_data", "classification", "model_repository", "statistics"]
_Handler = Callable[[Request, DataPlane], Awaitable[Response]]


def routes(plane: DataPlane) -> list[BaseRoute]:
    """All of the protocol but inference on the model that is here."""

    def route(path: str, handler: _Handler, method: str = "GET") -> Route:
        async def answer(request: Request) -> Response:
            try:
                model, version = (request.path_params.get(key) for key in ("model", "version"))
                found = plane if model is None else plane.find(model, version)
                return await handler(request, found)
            except TwinpathError as error:
                return JSONResponse({"error": error.message}, error.http_status)

        return Route(path, answer, methods=[method])

    def model_routes(suffix: str, handler: _Handler, method: str = "GET") -> list[Route]:
        prefix = "/v2/models/{model}"
        paths = (f"{prefix}{suffix}", f"{prefix}/versions/{{version}}{suffix}")
        return [route(path, handler, method) for path in paths]

    return [
        route("/v2", _server),
        route("/v2/health/live", _live),
        route("/v2/health/ready", _ready),
        route("/v2/models/stats", _statistics),
        *model_routes("", _metadata),
        *model_routes("/ready", _ready),
        *model_routes("/stats", _statistics),
        # Only reached for models and versions that are not here.
        *model_routes("/infer", _metadata, "POST"),
        route("/v2/repository/index", _index, "POST"),
        route("/v2/repository/models/{model}/load", _load, "POST"),
        route("/v2/repository/models/{model}/unload", _unload, "POST"),
    ]


async def _server(request: Request, plane: DataPlane) -> Response:
    return JSONResponse(
        {"name": "twinpath", "version": twinpath.__version__, "extensions": EXTENSIONS}
    )


async def _live(request: Request, plane: DataPlane) -> Response:
    return JSONResponse({"live": True})


async def _ready(request: Request, plane: DataPlane) -> Response:
    missing = await plane.ready()
    if missing:
        text = f"not ready: {', '.join(missing)}"
        return JSONResponse({"error": text, "ready": False}, 503)
    return JSONResponse({"name": plane.name, "ready": True})


async def _metadata(request: Request, plane: DataPlane) -> Response:
    return JSONResponse(metadata(plane))


async def _statistics(request: Request, plane: DataPlane) -> Response:
    return JSONResponse({"model_stats": [plane.statistics.as_dict(plane.name, plane.version)]})


async def _index(request: Request, plane: DataPlane) -> Response:
    missing = await plane.ready()
    if missing and await _asks_for_ready(request):
        return JSONResponse([])
    state = {"state": "UNAVAILABLE", "reason": ", ".join(missing)} if missing else {
        "state": "READY", "reason": "",
    }  # fmt: skip
    return JSONResponse([{"name": plane.name, "version": plane.version, **state}])


async def _asks_for_ready(request: Request) -> bool:
    """Whether a request for the index wants ready models only. Raises MalformedBodyError."""
    body = await request.body()
    try:
        wanted = orjson.loads(body) if body else {}
    except orjson.JSONDecodeError as error:
        raise MalformedBodyError(f"the body is no JSON: {error}") from None
    if not isinstance(wanted, dict) or not isinstance(wanted.get("ready", False), bool):
        raise MalformedBodyError('the body is no {"ready": true} or {"ready": false}')
    return bool(wanted.get("ready", False))


async def _load(request: Request, plane: DataPlane) -> Response:
    await plane.switch(True)
    return JSONResponse({})


async def _unload(request: Request, plane: DataPlane) -> Response:
    await plane.switch(False)
    return JSONResponse({})
