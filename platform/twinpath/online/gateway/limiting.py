"""Rate limits and quotas of each caller, with the `limits` library."""

import time
from collections.abc import Awaitable

import limits
from limits import aio
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter, SlidingWindowCounterRateLimiter

from twinpath.errors import LimitError, QuotaError
from twinpath.online.dataplane import Ask


class Limit:
    """Rule: one caller has no more than its share of requests in a window of time.

    The window slides for rates; a quota's begins anew each day. In memory a replica grants its
    part of the limit, ``1 / replicas`` and at least one request.
    """

    def __init__(self, text: str, *, quota: bool = False, replicas: int = 1) -> None:
        self._text, self._quota = text, quota
        whole = limits.parse(text)
        self._item = type(whole)(max(1, whole.amount // replicas), whole.multiples)
        kind = FixedWindowRateLimiter if quota else SlidingWindowCounterRateLimiter
        self._limiter = kind(MemoryStorage())

    def admit(self, ask: Ask) -> Awaitable[None] | None:
        """Raises LimitError or QuotaError."""
        caller = caller_of(ask)
        if not self._limiter.hit(self._item, caller):
            reset_s = self._limiter.get_window_stats(self._item, caller).reset_time
            raise refusal(self._text, self._quota, reset_s)
        return None


class SharedLimit:
    """Rule: the same, counted in Redis for all replicas together.

    Without Redis nobody would be served or everybody would; a request then fails with 500 and
    the reason in the log.
    """

    def __init__(self, text: str, redis_url: str, graph: str, *, quota: bool = False) -> None:
        self._text, self._quota, self._graph = text, quota, graph
        self._item = limits.parse(text)
        storage = limits.storage.storage_from_string(f"async+{redis_url}", implementation="redispy")
        kind = (
            aio.strategies.FixedWindowRateLimiter
            if quota
            else aio.strategies.SlidingWindowCounterRateLimiter
        )
        self._limiter = kind(storage)

    async def admit(self, ask: Ask) -> None:
        """Raises LimitError or QuotaError."""
        names = (self._graph, caller_of(ask))
        if not await self._limiter.hit(self._item, *names):
            stats = await self._limiter.get_window_stats(self._item, *names)
            raise refusal(self._text, self._quota, stats.reset_time)


def caller_of(ask: Ask) -> str:
    """The principal, or the address of one that did not say who it is."""
    return ask.principal or f"address {ask.peer}"


def refusal(text: str, quota: bool, reset_s: float) -> LimitError:
    """The error for a caller at its limit; ``reset_s`` is Unix time."""
    wait_s = max(1.0, reset_s - time.time())
    if quota:
        return QuotaError(f"the quota of {text} is used up: try again in {wait_s:.0f} s", wait_s)
    return LimitError(f"the limit of {text} is reached: try again in {wait_s:.0f} s", wait_s)
