"""Limits on the tokens that each caller's requests cost, known only once they were given."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable
from typing import Any

import limits
from limits.errors import StorageError

from twinpath.errors import LimitError
from twinpath.online.dataplane import Ask
from twinpath.online.gateway.limiting import REDIS_S, caller_of, unreachable
from twinpath.online.gateway.windows import make_room

_LOG = logging.getLogger(__name__)


class TokenLimit:
    """Rule: a caller whose requests cost so many tokens in a window of time waits.

    What a request will cost is not known when it comes: one is let in while anything is left, and
    what it cost is charged when it ends, also when the caller hung up. The window slides, as that
    of `windows.SlidingWindows`: the one before weighs less the further it is gone.
    """

    def __init__(self, text: str, *, replicas: int = 1) -> None:
        self._text = text
        whole = limits.parse(text)
        self._amount, self._seconds = max(1, whole.amount // replicas), whole.get_expiry()
        #: Caller → the number of its window, its tokens there, its tokens in the one before.
        self._spent: dict[str, list[int]] = {}

    def admit(self, ask: Ask) -> Awaitable[None] | None:
        """Raises LimitError with the seconds until something is left."""
        wait_s = self.wait_s(caller_of(ask), time.time())
        if wait_s:
            raise _used_up(self._text, wait_s)
        return None

    def spent(self, ask: Ask, tokens: int) -> None:
        """The request cost this."""
        if tokens:
            self.charge(caller_of(ask), tokens, time.time())

    def charge(self, caller: str, tokens: int, now_s: float) -> None:
        """Count tokens at a time."""
        window = int(now_s // self._seconds)
        counts = self._spent.get(caller)
        if counts is None:
            make_room(self._spent, lambda c: c[0] < window - 1)
            counts = self._spent[caller] = [window, 0, 0]
        self._turn(counts, window)
        counts[1] += tokens

    def wait_s(self, caller: str, now_s: float) -> float:
        """Seconds until a caller may ask again; 0 for at once."""
        counts = self._spent.get(caller)
        if counts is None:
            return 0.0
        self._turn(counts, int(now_s // self._seconds))
        return _wait_s(counts[1], counts[2], self._amount, self._seconds, now_s)

    @staticmethod
    def _turn(counts: list[int], window: int) -> None:
        if counts[0] != window:
            counts[2] = counts[1] if counts[0] == window - 1 else 0
            counts[0], counts[1] = window, 0


class SharedTokenLimit:
    """Rule: the same, counted in Redis for all replicas together.

    While Redis does not answer nobody is let in: RetryLaterError, at once after the first. What
    requests cost meanwhile is charged when it answers again.
    """

    def __init__(self, text: str, redis_url: str, graph: str) -> None:
        self._text, self._graph = text, graph
        whole = limits.parse(text)
        self._amount, self._seconds = whole.amount, whole.get_expiry()
        self._storage: Any = limits.storage.storage_from_string(
            f"async+{redis_url}", implementation="redispy", wrap_exceptions=True
        )
        self._down_until_s = 0.0
        #: Caller → tokens that are not charged yet.
        self._owed: Counter[str] = Counter()
        self._charging: set[asyncio.Task[None]] = set()

    async def admit(self, ask: Ask) -> None:
        """Raises LimitError or RetryLaterError."""
        if time.monotonic() < self._down_until_s:
            raise unreachable()
        now_s, caller = time.time(), caller_of(ask)
        window = int(now_s // self._seconds)
        try:
            async with asyncio.timeout(REDIS_S):
                current = await self._storage.get(self._key(caller, window))
                before = await self._storage.get(self._key(caller, window - 1))
        except (StorageError, OSError, TimeoutError) as error:
            self._down_until_s = time.monotonic() + REDIS_S
            _LOG.error("tokens cannot be counted in Redis: %r", error)
            raise unreachable() from None
        current += self._owed[caller]
        wait_s = _wait_s(current, before, self._amount, self._seconds, now_s)
        if wait_s:
            raise _used_up(self._text, wait_s)

    def spent(self, ask: Ask, tokens: int) -> None:
        """The request cost this. Nobody waits until Redis knows."""
        if tokens:
            self._owed[caller_of(ask)] += tokens
            charging = asyncio.get_running_loop().create_task(self._charge())
            self._charging.add(charging)
            charging.add_done_callback(self._charging.discard)

    async def _charge(self) -> None:
        owed, self._owed = self._owed, Counter()
        window = int(time.time() // self._seconds)
        try:
            async with asyncio.timeout(REDIS_S):
                for caller, tokens in [*owed.items()]:
                    key = self._key(caller, window)
                    await self._storage.incr(key, 2 * self._seconds, amount=tokens)
                    del owed[caller]
        except (StorageError, OSError, TimeoutError) as error:
            self._owed.update(owed)
            _LOG.error("%d tokens are charged later: %r", owed.total(), error)

    def _key(self, caller: str, window: int) -> str:
        return f"twinpath-tokens/{self._graph}/{self._text}/{window}/{caller}"


def _wait_s(current: int, before: int, amount: int, seconds: int, now_s: float) -> float:
    """Seconds until less than ``amount`` counts, of tokens in this window and the one before; 0
    for now."""
    position = now_s / seconds
    left = 1.0 - (position - int(position))
    if current + before * left < amount:
        return 0.0
    if current < amount:
        return max(left - (amount - current) / before, 1e-3) * seconds
    # This window's own tokens are enough; in the next one they weigh less and less.
    return (left + 1.0 - amount / current) * seconds + 1e-3


def _used_up(text: str, wait_s: float) -> LimitError:
    return LimitError(
        f"the limit of {text} tokens is used up: try again in {wait_s:.0f} s", max(1.0, wait_s)
    )
