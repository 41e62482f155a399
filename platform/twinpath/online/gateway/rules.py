"""The gateway: a visible list of rules that every request passes, over HTTP and gRPC alike."""

import functools
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, runtime_checkable

from twinpath.online.dataplane import Ask
from twinpath.online.exchange import Headers


class Rule(Protocol):
    """One rule. It may also have ``admit_rows(ask)``, called once ``ask.rows`` is known,
    ``standing(ask)``, what a limit still grants, ``done(ask, status, code)``, told at the end,
    and ``close()``. One whose attribute ``passive`` is true lets everything in and is not asked.
    """

    def admit(self, ask: Ask) -> Awaitable[None] | None:
        """Raises TwinpathError to refuse; may fill in ``ask``. Waits only where it has to."""


Admit = Callable[[Ask], Awaitable[None] | None]
#: Where a caller stands with a limit: its number of requests, how many of them remain, and in how
#: many seconds it begins anew. A plain tuple, as one is made for each answer.
Standing = tuple[int, int, float]


@runtime_checkable
class RowsRule(Protocol):
    """A rule about the number of rows."""

    def admit_rows(self, ask: Ask) -> None:
        """Raises TwinpathError to refuse."""


@runtime_checkable
class LimitRule(Protocol):
    """A rule that counts requests."""

    def standing(self, ask: Ask) -> Standing | None:
        """Where the caller stands; None if it was never counted."""


@runtime_checkable
class DoneRule(Protocol):
    """A rule that is told of answers."""

    def done(self, ask: Ask, status: int, code: str) -> None:
        """The request was answered."""


@runtime_checkable
class SpendRule(Protocol):
    """A rule about what requests cost, which is known only afterwards."""

    def spent(self, ask: Ask, tokens: int) -> None:
        """The request cost this."""


class Gateway:
    """`frontend.Gate` over a list of rules, in their order. ``tell_limits``: answers carry
    RateLimit-Limit, RateLimit-Remaining and RateLimit-Reset."""

    def __init__(self, rules: Sequence[Rule], *, tell_limits: bool = True) -> None:
        self.rules = tuple(rules)
        self._admits = tuple(r.admit for r in self.rules if not getattr(r, "passive", False))
        self._about_rows = [rule for rule in self.rules if isinstance(rule, RowsRule)]
        self._limits = [r for r in self.rules if isinstance(r, LimitRule)] if tell_limits else []
        self._told = [rule for rule in self.rules if isinstance(rule, DoneRule)]
        self._spends = [rule for rule in self.rules if isinstance(rule, SpendRule)]

    def admit(self, ask: Ask) -> Awaitable[None] | None:
        """Every rule in turn; an awaitable only if one of them has to wait."""
        return admit_in_turn(self._admits, ask)

    def admit_rows(self, ask: Ask) -> None:
        """Rules about the number of rows."""
        for rule in self._about_rows:
            rule.admit_rows(ask)

    def headers(self, ask: Ask) -> Headers:
        """Headers to add to the answer: where the caller stands with the limit that it is
        nearest to."""
        if not self._limits:
            return []
        nearest = self._limits[0].standing(ask)
        for rule in self._limits[1:]:
            found = rule.standing(ask)
            if found is not None and (
                nearest is None or found[1] * nearest[0] < nearest[1] * found[0]
            ):
                nearest = found
        if nearest is None:
            return []
        amount, remaining, reset_s = nearest
        return [
            _numbered(b"ratelimit-limit", amount),
            (b"ratelimit-remaining", b"%d" % remaining),
            _numbered(b"ratelimit-reset", int(reset_s + 0.999)),
        ]

    def done(self, ask: Ask, status: int, code: str) -> None:
        """The request was answered."""
        for rule in self._told:
            rule.done(ask, status, code)

    def spent(self, ask: Ask, tokens: int) -> None:
        """What a request cost, once that is known."""
        for rule in self._spends:
            rule.spent(ask, tokens)

    def close(self) -> None:
        """Let rules finish what they hold, such as lines of a log."""
        for rule in self.rules:
            getattr(rule, "close", lambda: None)()


@functools.lru_cache(1024)
def _numbered(name: bytes, number: int) -> tuple[bytes, bytes]:
    """A header whose value is one of few."""
    return name, b"%d" % number


def admit_in_turn(admits: tuple[Admit, ...], ask: Ask) -> Awaitable[None] | None:
    """Ask each rule; an awaitable for the rest of them only where one has to wait."""
    for position, admit in enumerate(admits):
        pending = admit(ask)
        if pending is not None:
            return _rest(pending, admits[position + 1 :], ask)
    return None


async def _rest(pending: Awaitable[None], admits: tuple[Admit, ...], ask: Ask) -> None:
    await pending
    for admit in admits:
        waiting = admit(ask)
        if waiting is not None:
            await waiting
