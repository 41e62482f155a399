"""Operations on rollouts for the command line: on the registry itself, or over a server's API."""

import getpass
import http.client
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from twinpath.errors import AccessError, TwinpathError, error_of

#: Environment variables for what one does not want to type, or to have in a shell's history.
URL, KEY = "TWINPATH_URL", "TWINPATH_API_KEY"


def operate(
    operation: str,
    arguments: Mapping[str, Any],
    *,
    url: str | None = None,
    tracking_uri: str | None = None,
    require: Sequence[str] = (),
) -> dict[str, Any]:
    """Do it, and give the answer. With ``url`` the server's controller does it; else this process
    does, in the registry, which a controller sees within seconds. Raises TwinpathError."""
    if url is not None:
        return _over_http(url.rstrip("/"), operation, arguments)
    from twinpath.online.rollouts.desk import Desk
    from twinpath.online.rollouts.operations import Operations
    from twinpath.registry.client import Registry

    registry = Registry(tracking_uri, timeout_s=30.0)
    try:
        given = {"by": getpass.getuser()} | dict(arguments)
        return Operations(Desk(registry, require=require)).run(operation, given)
    finally:
        registry.close()


def _over_http(url: str, operation: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    path = f"{url}/admin/rollouts/{urllib.parse.quote(arguments['model'], safe='')}"
    body: bytes | None = None
    if operation == "history":
        path += "/history"
    elif operation == "start":
        body = json.dumps(arguments["rollout"]).encode()
    elif operation != "status":
        path += f"/{operation}"
        body = json.dumps({"reason": arguments.get("reason", "")}).encode()
    headers = {"content-type": "application/json"}
    key = os.environ.get(KEY)
    if key:
        headers["x-api-key"] = key
    request = urllib.request.Request(path, body, headers, method="GET" if body is None else "POST")
    try:
        with urllib.request.urlopen(request, timeout=90) as answer:
            found: dict[str, Any] = json.load(answer)
            return found
    except urllib.error.HTTPError as error:
        raise _told(error) from None
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        raise TwinpathError(f"{url} cannot be asked: {error}") from None


def _told(error: urllib.error.HTTPError) -> TwinpathError:
    """What the server says is wrong, as our own error."""
    try:
        given = json.load(error)["error"]
        code, message = str(given["code"]), str(given["message"])
    except (ValueError, KeyError, TypeError):
        return TwinpathError(f"the server answers {error.code} {error.reason}")
    if code == AccessError.code:
        message += f". The key is read from the environment variable {KEY}"
    return error_of(code, message)
