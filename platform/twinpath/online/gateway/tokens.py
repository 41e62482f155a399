"""JWTs of an identity provider, checked against its published keys (RFC 7519, RFC 7517)."""

import asyncio
import http.client
import json
import logging
import time
import urllib.request
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import jwt

from twinpath.errors import AccessError, ConfigError, RetryLaterError
from twinpath.online.gateway.args import JwtArgs
from twinpath.online.gateway.authentication import Principal
from twinpath.online.gateway.watched import Watched
from twinpath.online.policy import Priority

_LOG = logging.getLogger(__name__)
#: The right to push features: a token's scope, and of an API key a name among its graphs.
PUSH_SCOPE = "features:push"
_CACHED = 10_000
#: Keys are not fetched more often, however many unknown ones are named.
_FETCH_PAUSE_S = 10.0
#: How long a file of keys is believed to be unchanged.
_CHECK_S = 1.0
#: Bytes of a token that are looked at.
_LONGEST = 8192


class Tokens:
    """Authenticator for JWTs. A file of keys is read anew when it changes; keys from a URL are
    fetched in a thread, behind the requests' backs once there are some. Keys that cannot be had
    are left as they were, with an error in the log."""

    def __init__(self, args: JwtArgs) -> None:
        self._args = args
        self._priority = Priority[args.priority.upper()]
        self._keys: dict[str | None, Any] = {}
        self._fetched_s = -1e9
        self._fetching: asyncio.Task[None] | None = None
        self._known: dict[bytes, Principal] = {}
        self._watched: Watched | None = None
        if args.jwks_file is not None:
            self._watched = Watched(args.jwks_file)
            self._keys = _keys(_read(args.jwks_file), str(args.jwks_file))

    def reads(self, credentials: bytes) -> bool:
        """See `Authenticator`."""
        return credentials.count(b".") == 2

    def principal(self, credentials: bytes) -> Principal | Awaitable[Principal]:
        """See `Authenticator`."""
        self._refresh()
        found = self._known.get(credentials)
        if found is not None:
            if found.expires_s is not None and time.time() < found.expires_s + self._args.leeway_s:
                return found
            del self._known[credentials]
        if len(credentials) > _LONGEST:
            raise AccessError(f"this token is longer than {_LONGEST} bytes")
        kid = _key_id(credentials)
        if self._key(kid) is None and self._args.jwks_url is not None:
            if self._fetching is None and time.monotonic() - self._fetched_s > _FETCH_PAUSE_S:
                self._start_fetch()
            if self._fetching is not None:
                return self._after(self._fetching, credentials, kid)
        return self._verified(credentials, kid)

    def _refresh(self) -> None:
        """Begin to renew keys that are too old; reads a file that changed."""
        args = self._args
        if args.jwks_url is not None:
            if self._fetching is None and time.monotonic() - self._fetched_s > args.refresh_s:
                self._start_fetch()
        elif self._watched is not None and self._watched.changed(_CHECK_S):
            assert args.jwks_file is not None
            try:
                self._replace(_keys(_read(args.jwks_file), str(args.jwks_file)))
            except ConfigError as error:
                _LOG.error("keys stay as they were: %s", error)

    def _start_fetch(self) -> None:
        def over(_: object) -> None:
            self._fetching = None

        self._fetched_s = time.monotonic()
        self._fetching = asyncio.get_running_loop().create_task(self._fetch())
        self._fetching.add_done_callback(over)

    async def _fetch(self) -> None:
        url = self._args.jwks_url
        assert url is not None
        try:
            self._replace(_keys(await asyncio.to_thread(_download, url), url))
        except (OSError, http.client.HTTPException, ValueError, ConfigError) as error:
            _LOG.error("keys of %s stay as they were: %s", url, error)

    async def _after(
        self, fetch: asyncio.Task[None], credentials: bytes, kid: str | None
    ) -> Principal:
        await asyncio.shield(fetch)
        return self._verified(credentials, kid)

    def _replace(self, keys: dict[str | None, Any]) -> None:
        self._keys = keys
        self._known.clear()

    def _key(self, kid: str | None) -> Any:
        if kid is None and len(self._keys) == 1:
            return next(iter(self._keys.values()))
        return self._keys.get(kid)

    def _verified(self, credentials: bytes, kid: str | None) -> Principal:
        if not self._keys:
            raise RetryLaterError("the issuer's keys cannot be had now", _FETCH_PAUSE_S)
        key = self._key(kid)
        if key is None:
            raise AccessError("this token is signed with a key that its issuer does not publish")
        args = self._args
        try:
            claims = jwt.decode(
                credentials, key, algorithms=list(args.algorithms), audience=args.audience,
                issuer=args.issuer, leeway=args.leeway_s, options={"require": ["exp", "sub"]},
            )  # fmt: skip
            name, ends_s = str(claims["sub"]), float(claims["exp"])
            name.encode()  # half a surrogate pair could stand in no log
        except (jwt.PyJWTError, ValueError, TypeError, RecursionError) as error:
            raise AccessError(f"this token is not accepted: {error}") from None
        prefix = args.scope_prefix
        listed = _scopes(claims.get("scope"))
        graphs = frozenset(one[len(prefix) :] for one in listed if one.startswith(prefix))
        graphs |= {PUSH_SCOPE} & set(listed)
        admin = args.admin_scope is not None and args.admin_scope in listed
        found = Principal(name, graphs, ends_s, self._priority, admin=admin)
        if len(self._known) >= _CACHED:
            self._known.clear()
        self._known[credentials] = found
        return found


def _scopes(claim: object) -> list[str]:
    """Of a string with spaces, as RFC 8693 has it, or of a list; any other claim opens nothing."""
    if isinstance(claim, str):
        return claim.split()
    return [one for one in claim if isinstance(one, str)] if isinstance(claim, list) else []


def _key_id(credentials: bytes) -> str | None:
    try:
        kid = jwt.get_unverified_header(credentials).get("kid")
    except (jwt.PyJWTError, ValueError, RecursionError) as error:
        raise AccessError(f"this token is not a JWT: {error}") from None
    return kid if isinstance(kid, str) else None


def _keys(text: bytes, where: str) -> dict[str | None, Any]:
    try:
        return {key.key_id: key.key for key in jwt.PyJWKSet.from_dict(json.loads(text)).keys}
    except (jwt.PyJWTError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"{where} is no JSON Web Key Set: {error}") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"keys {str(path)!r} cannot be read: {error}") from None


def _download(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=5) as answer:
        body: bytes = answer.read(1 << 20)
        return body
