"""Rate limits and quotas of each caller: in memory, or with the `limits` library in Redis."""

import asyncio
import functools
import ipaddress
import logging
import time
import urllib.parse
from collections.abc import Awaitable

import limits
from limits import aio
from limits.errors import StorageError

from twinpath.errors import LimitError, QuotaError, RetryLaterError
from twinpath.online.dataplane import Ask
from twinpath.online.gateway.rules import Policy
from twinpath.online.gateway.windows import FixedWindows, SlidingWindows, make_room

_LOG = logging.getLogger(__name__)
#: How long Redis may take, and how long it is left alone after it did not answer.
REDIS_S = 1.0
#: How long a caller's standing in Redis is counted on from what was read.
_STANDING_S = 1.0


class Limit:
    """Rule: one caller has no more than its share of requests in a window of time.

    The window slides for rates; a quota's begins with its first request. A replica grants its
    part of the limit, ``1 / replicas`` and at least one request.
    """

    def __init__(self, text: str, *, quota: bool = False, replicas: int = 1) -> None:
        self._text, self._quota = text, quota
        whole = limits.parse(text)
        kind = FixedWindows if quota else SlidingWindows
        amount, seconds = max(1, whole.amount // replicas), whole.get_expiry()
        self._windows = kind(amount, seconds)
        self._policy = Policy(quota, amount, seconds)

    def admit(self, ask: Ask) -> Awaitable[None] | None:
        """Raises LimitError or QuotaError."""
        caller = ask.principal or caller_of(ask)
        wait_s, remaining, ends_s = self._windows.hit(caller, time.time())
        if ask.standing is None or wait_s:
            ask.standing = (self._policy, remaining, ends_s)
        else:
            self._policy.stand(ask, remaining, ends_s)
        if wait_s:
            raise refusal(self._text, self._quota, wait_s)
        return None


class SharedLimit:
    """Rule: the same, counted in Redis for all replicas together.

    While Redis does not answer nobody is let in: RetryLaterError, at once after the first.
    ``name`` keeps limits apart that have the same text.
    """

    def __init__(
        self, text: str, redis_url: str, graph: str, *, quota: bool = False, name: str = "limit"
    ) -> None:
        self._text, self._quota, self._graph = text, quota, graph
        parsed = limits.parse(text)
        namespace = f"twinpath-{name}-{'quota' if quota else 'rate'}"
        self._item = type(parsed)(parsed.amount, parsed.multiples, namespace)
        self._policy = Policy(quota, parsed.amount, parsed.get_expiry())
        storage = limits.storage.storage_from_string(
            f"async+{redis_url}", implementation="redispy", wrap_exceptions=True
        )
        kind = (
            aio.strategies.FixedWindowRateLimiter
            if quota
            else aio.strategies.SlidingWindowCounterRateLimiter
        )
        self._limiter = kind(storage)
        #: Caller → what remains of all replicas' limit, when it begins anew (Unix time), and when
        #: that was read, which may be a second ago.
        self._standings: dict[str, tuple[int, float, float]] = {}
        self._down_until_s = 0.0

    async def admit(self, ask: Ask) -> None:
        """Raises LimitError, QuotaError or RetryLaterError."""
        caller = caller_of(ask)
        if time.monotonic() < self._down_until_s:
            raise unreachable()
        try:
            async with asyncio.timeout(REDIS_S):
                granted = await self._limiter.hit(self._item, self._graph, caller)
                await self._count(caller, granted)
        except (StorageError, OSError, TimeoutError) as error:
            self._down_until_s = time.monotonic() + REDIS_S
            _LOG.error("limits cannot be counted in Redis: %r", error)
            raise unreachable() from None
        remaining, ends_s, _ = self._standings[caller]
        wait_s = ends_s - time.time()
        self._policy.stand(ask, remaining, max(0.0, wait_s))
        if not granted:
            ask.standing = (self._policy, 0, max(0.0, wait_s))
            raise refusal(self._text, self._quota, wait_s)

    async def _count(self, caller: str, granted: bool) -> None:
        known, now_s = self._standings.get(caller), time.monotonic()
        if granted and known is not None and known[0] and now_s - known[2] < _STANDING_S:
            self._standings[caller] = (known[0] - 1, known[1], known[2])
            return
        stats = await self._limiter.get_window_stats(self._item, self._graph, caller)
        if known is None:
            make_room(self._standings, lambda standing: now_s - standing[2] > _STANDING_S)
        self._standings[caller] = (stats.remaining, stats.reset_time, now_s)


def caller_of(ask: Ask) -> str:
    """The principal, or the address of one that did not say who it is."""
    return ask.principal or f"address {address_of(ask.peer)}"


@functools.lru_cache(10_000)
def address_of(peer: str) -> str:
    """The address in a peer's name, ``10.0.0.1`` or gRPC's ``ipv4:10.0.0.1:4711``, without its
    port, which changes with each connection. Of IPv6 the network, as a caller has 2⁶⁴ of them."""
    text = urllib.parse.unquote(peer)
    scheme, _, rest = text.partition(":")
    if scheme in ("ipv4", "ipv6"):
        text = rest.rpartition(":")[0] or rest
    try:
        address = ipaddress.ip_address(text.strip("[]").partition("%")[0])
    except ValueError:
        return text
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


def refusal(text: str, quota: bool, wait_s: float) -> LimitError:
    """The error for a caller at its limit."""
    wait_s = max(1.0, wait_s)
    if quota:
        return QuotaError(f"the quota of {text} is used up: try again in {wait_s:.0f} s", wait_s)
    return LimitError(f"the limit of {text} is reached: try again in {wait_s:.0f} s", wait_s)


def unreachable() -> RetryLaterError:
    """The error for everybody while Redis does not answer."""
    return RetryLaterError("limits cannot be counted now: try again in a second", REDIS_S)
