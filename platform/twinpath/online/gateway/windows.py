"""How many requests each caller made in a window of time: pure, the caller gives the clock.

The windows are those of the `limits` library's strategies, request for request. Its own storage
in memory looks at every caller a hundred times a second, in a thread that it starts for each look.
"""

from typing import Any

#: More callers are not remembered at once: the oldest tenth is forgotten, and begins anew.
BOUND = 100_000


class SlidingWindows:
    """Counts of this window and of the one before it, which weighs less the further it is gone.
    Windows begin at multiples of their length since the epoch."""

    def __init__(self, amount: int, seconds: int) -> None:
        self.amount, self._seconds = amount, seconds
        #: Caller → the number of its window, its count there, its count in the one before.
        self._counts: dict[str, list[int]] = {}

    def hit(self, caller: str, now_s: float) -> float:
        """Count a request: 0 if it is within the limit, else the seconds to wait for one."""
        position = now_s / self._seconds
        window = int(position)
        counts = self._counts.get(caller)
        if counts is None:
            make_room(self._counts, lambda c: c[0] < window - 1)
            self._counts[caller] = [window, 1, 0]
            return 0.0
        if counts[0] != window:
            self._turn(counts, window)
        current, before = counts[1], counts[2]
        left = 1.0 - (position - window)
        if current + int(before * left) < self.amount:
            counts[1] = current + 1
            return 0.0
        if current < self.amount:
            left -= (self.amount - current) / before
        return max(left * self._seconds, 1e-3)

    def standing(self, caller: str, now_s: float) -> tuple[int, int, float] | None:
        """The limit, how many requests of it remain, and seconds until the window ends; None for
        a stranger."""
        counts = self._counts.get(caller)
        if counts is None:
            return None
        position = now_s / self._seconds
        window = int(position)
        if counts[0] != window:
            self._turn(counts, window)
        left = 1.0 - (position - window)
        used = counts[1] + int(counts[2] * left)
        remaining = self.amount - used if used < self.amount else 0
        return self.amount, remaining, left * self._seconds

    @staticmethod
    def _turn(counts: list[int], window: int) -> None:
        counts[2] = counts[1] if counts[0] == window - 1 else 0
        counts[0], counts[1] = window, 0


class FixedWindows:
    """Counts since a window began, which it does with the first request after the last one."""

    def __init__(self, amount: int, seconds: int) -> None:
        self.amount, self._seconds = amount, seconds
        #: Caller → when its window ends, its count there.
        self._counts: dict[str, list[float]] = {}

    def hit(self, caller: str, now_s: float) -> float:
        """See `SlidingWindows.hit`."""
        counts = self._counts.get(caller)
        if counts is None or now_s >= counts[0]:
            if counts is None:
                make_room(self._counts, lambda c: c[0] <= now_s)
            self._counts[caller] = [now_s + self._seconds, 1]
            return 0.0
        if counts[1] < self.amount:
            counts[1] += 1
            return 0.0
        return counts[0] - now_s

    def standing(self, caller: str, now_s: float) -> tuple[int, int, float] | None:
        """See `SlidingWindows.standing`."""
        counts = self._counts.get(caller)
        if counts is None:
            return None
        if now_s >= counts[0]:
            return self.amount, self.amount, float(self._seconds)
        return self.amount, self.amount - int(counts[1]), counts[0] - now_s


def make_room(counts: dict[str, Any], over: Any, bound: int | None = None) -> None:
    """Room for one more caller: those whose windows are over go, then the oldest tenth."""
    limit = BOUND if bound is None else bound
    if len(counts) < limit:
        return
    for caller in [caller for caller, count in counts.items() if over(count)]:
        del counts[caller]
    if len(counts) >= limit:
        for caller in list(counts)[: max(1, limit // 10)]:
            del counts[caller]
