"""Limits on the tokens that each caller's requests cost, known only once they were given."""

import time
from collections.abc import Awaitable

import limits

from twinpath.errors import LimitError
from twinpath.online.dataplane import Ask
from twinpath.online.gateway.limiting import caller_of
from twinpath.online.gateway.windows import make_room


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
            raise LimitError(
                f"the limit of {self._text} tokens is used up: try again in {wait_s:.0f} s",
                max(1.0, wait_s),
            )
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
        position = now_s / self._seconds
        window = int(position)
        self._turn(counts, window)
        current, before = counts[1], counts[2]
        left = 1.0 - (position - window)
        if current + before * left < self._amount:
            return 0.0
        if current < self._amount:
            return max(left - (self._amount - current) / before, 1e-3) * self._seconds
        # This window's own tokens are enough; in the next one they weigh less and less.
        return (left + 1.0 - self._amount / current) * self._seconds + 1e-3

    @staticmethod
    def _turn(counts: list[int], window: int) -> None:
        if counts[0] != window:
            counts[2] = counts[1] if counts[0] == window - 1 else 0
            counts[0], counts[1] = window, 0
