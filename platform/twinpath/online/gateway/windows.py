"""How many requests each caller made in a window of time: pure, the caller gives the clock.

The windows are those of the `limits` library's strategies, request for request. Its own storage
in memory looks at every caller a hundred times a second, in a thread that it starts for each look.
"""

from typing import Any

#: More callers are not remembered at once: the oldest tenth is forgotten, and begins anew.
BOUND = 100_000

#: What came of a request: 0 if it is within the limit, else the seconds to wait for one; how many
#: more remain; seconds until the window ends.
Hit = tuple[float, int, float]


class SlidingWindows:
    """Counts of this window and of the one before it, which weighs less the further it is gone.
    Windows begin at multiples of their length since the epoch."""

    def __init__(self, amount: int, seconds: int) -> None:
        self.amount, self._seconds = amount, seconds
        #: Caller → the number of its window, its count there, its count in the one before.
        self._counts: dict[str, list[int]] = {}

    def hit(self, caller: str, now_s: float) -> Hit:
        """Count a request."""
        position = now_s / self._seconds
        window = int(position)
        counts = self._counts.get(caller)
        if counts is None:
            make_room(self._counts, lambda c: c[0] < window - 1)
            self._counts[caller] = [window, 1, 0]
            return 0.0, self.amount - 1, (1.0 - (position - window)) * self._seconds
        if counts[0] != window:
            self._turn(counts, window)
        current, before = counts[1], counts[2]
        left = 1.0 - (position - window)
        ends_s = left * self._seconds
        remaining = self.amount - current - int(before * left)
        if remaining > 0:
            counts[1] = current + 1
            return 0.0, remaining - 1, ends_s
        if current < self.amount:
            left -= (self.amount - current) / before
        return max(left * self._seconds, 1e-3), 0, ends_s

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

    def hit(self, caller: str, now_s: float) -> Hit:
        """See `SlidingWindows.hit`."""
        counts = self._counts.get(caller)
        if counts is None or now_s >= counts[0]:
            if counts is None:
                make_room(self._counts, lambda c: c[0] <= now_s)
            self._counts[caller] = [now_s + self._seconds, 1]
            return 0.0, self.amount - 1, float(self._seconds)
        ends_s = counts[0] - now_s
        if counts[1] < self.amount:
            counts[1] += 1
            return 0.0, self.amount - int(counts[1]), ends_s
        return ends_s, 0, ends_s


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
