"""JWTs of an identity provider, checked against its published keys (RFC 7519, RFC 7517)."""

import asyncio
import json
import logging
import time
import urllib.request
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import jwt

from twinpath.errors import AccessError, ConfigError
from twinpath.online.gateway.args import JwtArgs
from twinpath.online.gateway.authentication import Principal

_LOG = logging.getLogger(__name__)
_CACHED = 10_000
#: Keys are not fetched more often, however many unknown ones are named.
_FETCH_PAUSE_S = 10.0


class Tokens:
    """Authenticator for JWTs. Keys from a URL are fetched in a thread; a provider that cannot be
    reached leaves the keys as they were."""

    def __init__(self, args: JwtArgs) -> None:
        self._args = args
        self._keys: dict[str | None, Any] = {}
        self._fetched_s = -1e9
        self._fetching: asyncio.Task[None] | None = None
        self._known: dict[bytes, Principal] = {}
        if args.jwks_file is not None:
            self._keys = _keys(_read(args.jwks_file), str(args.jwks_file))

    def reads(self, credentials: bytes) -> bool:
        """See `Authenticator`."""
        return credentials.count(b".") == 2

    def principal(self, credentials: bytes) -> Principal | Awaitable[Principal]:
        """See `Authenticator`."""
        found = self._known.get(credentials)
        if found is not None:
            if found.expires_s is not None and time.time() < found.expires_s + self._args.leeway_s:
                return found
            del self._known[credentials]
        kid = _key_id(credentials)
        age_s = time.monotonic() - self._fetched_s
        if self._args.jwks_url is not None and (
            age_s > self._args.refresh_s or (kid not in self._keys and age_s > _FETCH_PAUSE_S)
        ):
            return self._after_fetch(credentials, kid)
        return self._verified(credentials, kid)

    async def _after_fetch(self, credentials: bytes, kid: str | None) -> Principal:
        if self._fetching is None:
            self._fetching = asyncio.get_running_loop().create_task(self._fetch())
        try:
            await asyncio.shield(self._fetching)
        finally:
            if self._fetching is not None and self._fetching.done():
                self._fetching = None
        return self._verified(credentials, kid)

    async def _fetch(self) -> None:
        url = self._args.jwks_url
        assert url is not None
        self._fetched_s = time.monotonic()
        try:
            self._keys = _keys(await asyncio.to_thread(_download, url), url)
            self._known.clear()
        except (OSError, ConfigError) as error:
            _LOG.error("keys of %s stay as they were: %s", url, error)

    def _verified(self, credentials: bytes, kid: str | None) -> Principal:
        key = self._keys.get(kid)
        if key is None and kid is None and len(self._keys) == 1:
            key = next(iter(self._keys.values()))
        if key is None:
            raise AccessError("this token is signed with a key that its issuer does not publish")
        args = self._args
        try:
            claims = jwt.decode(
                credentials, key, algorithms=list(args.algorithms), audience=args.audience,
                issuer=args.issuer, leeway=args.leeway_s, options={"require": ["exp", "sub"]},
            )  # fmt: skip
        except (jwt.InvalidTokenError, ValueError, TypeError) as error:
            raise AccessError(f"this token is not accepted: {error}") from None
        scopes = claims.get("scope", "")
        listed = scopes.split() if isinstance(scopes, str) else [str(one) for one in scopes]
        prefix = args.scope_prefix
        graphs = frozenset(one[len(prefix) :] for one in listed if one.startswith(prefix))
        found = Principal(str(claims["sub"]), graphs, float(claims["exp"]))
        if len(self._known) >= _CACHED:
            self._known.clear()
        self._known[credentials] = found
        return found


def _key_id(credentials: bytes) -> str | None:
    try:
        kid = jwt.get_unverified_header(credentials).get("kid")
    except (jwt.InvalidTokenError, ValueError) as error:
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
