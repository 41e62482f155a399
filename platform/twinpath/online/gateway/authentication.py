"""Who asks: API keys and JWTs. One of the authenticators has to know the caller."""

from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from twinpath.errors import AccessError, ForbiddenError
from twinpath.online.dataplane import Ask
from twinpath.online.gateway.rules import Rule, admit_in_turn
from twinpath.online.policy import Priority


@dataclass(frozen=True, slots=True)
class Principal:
    """A known caller: which graphs it may use (``*`` is all), until when (Unix time, seconds),
    how urgent its requests may be, limits of its own, and whether it may use the admin API."""

    name: str
    graphs: frozenset[str]
    expires_s: float | None = None
    max_priority: Priority = Priority.HIGH
    limits: tuple[Rule, ...] = ()
    admin: bool = False


class Authenticator(Protocol):
    """Knows callers by one kind of credentials."""

    def reads(self, credentials: bytes) -> bool:
        """Whether they are of its kind."""

    def principal(self, credentials: bytes) -> Principal | Awaitable[Principal]:
        """Who that is. Raises AccessError."""


class Authentication:
    """Rule: the caller is known, may use this graph, and is within limits of its own."""

    def __init__(self, authenticators: Sequence[Authenticator]) -> None:
        self._authenticators = authenticators

    def admit(self, ask: Ask) -> Awaitable[None] | None:
        """Raises AccessError, ForbiddenError or LimitError; fills in ``ask.principal``."""
        credentials = ask.headers.get(b"x-api-key")
        if credentials is None:
            credentials = _bearer(ask.headers)
        for authenticator in self._authenticators:
            if authenticator.reads(credentials):
                found = authenticator.principal(credentials)
                if type(found) is Principal:
                    return _let_in(ask, found)
                return _when(found, ask)  # type: ignore[arg-type]  # it is awaitable
        raise AccessError("these credentials are of no kind that is accepted here")


async def _when(found: Awaitable[Principal], ask: Ask) -> None:
    pending = _let_in(ask, await found)
    if pending is not None:
        await pending


def _let_in(ask: Ask, principal: Principal) -> Awaitable[None] | None:
    ask.principal = principal.name
    ask.scopes = principal.graphs
    ask.max_priority = principal.max_priority
    ask.admin = principal.admin
    if ask.graph not in principal.graphs and "*" not in principal.graphs:
        raise ForbiddenError(f"{principal.name!r} may not use graph {ask.graph!r}")
    if not principal.limits:
        return None
    return admit_in_turn(tuple(limit.admit for limit in principal.limits), ask)


def _bearer(headers: Mapping[bytes, bytes]) -> bytes:
    given = headers.get(b"authorization", b"")
    if given[:7].lower() != b"bearer ":
        raise AccessError(
            "no credentials: send 'Authorization: Bearer <key or token>' or 'X-API-Key: <key>'"
        )
    return given[7:].strip()
