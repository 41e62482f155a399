"""The gateway: a visible list of rules that every request passes, over HTTP and gRPC alike."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, runtime_checkable

from twinpath.online.dataplane import Ask
from twinpath.online.exchange import Headers


class Rule(Protocol):
    """One rule. It may also have ``admit_rows(ask)``, called once ``ask.rows`` is known,
    ``done(ask, status, code)``, told at the end, and ``close()``. One whose attribute ``passive``
    is true lets everything in and is not asked.
    """

    def admit(self, ask: Ask) -> Awaitable[None] | None:
        """Raises TwinpathError to refuse; may fill in ``ask``. Waits only where it has to."""


Admit = Callable[[Ask], Awaitable[None] | None]


class Policy:
    """A limit on requests as answers tell of it, in the headers RateLimit-Policy and RateLimit
    (draft-ietf-httpapi-ratelimit-headers-10): q requests in a window of w seconds, of which r
    remain for t seconds."""

    def __init__(self, quota: bool, amount: int, seconds: int) -> None:
        self.amount = amount
        self._name = b'"quota"' if quota else b'"rate"'
        self._header = (b"ratelimit-policy", b"%b;q=%d;w=%d" % (self._name, amount, seconds))

    def stand(self, ask: Ask, remaining: int, ends_s: float) -> None:
        """Note where the caller stands, if no other limit is nearer to it."""
        nearest = ask.standing
        if nearest is None or remaining * nearest[0].amount < nearest[1] * self.amount:
            ask.standing = (self, remaining, ends_s)

    def headers(self, remaining: int, ends_s: float) -> Headers:
        """What the answer says."""
        told = b"%b;r=%d;t=%d" % (self._name, remaining, int(ends_s + 0.999))
        return [self._header, (b"ratelimit", told)]


@runtime_checkable
class RowsRule(Protocol):
    """A rule about the number of rows."""

    def admit_rows(self, ask: Ask) -> None:
        """Raises TwinpathError to refuse."""


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
    """`frontend.Gate` over a list of rules, in their order. ``tell_limits``: answers say where the
    caller stands with the limit that it is nearest to."""

    def __init__(self, rules: Sequence[Rule], *, tell_limits: bool = True) -> None:
        self.rules = tuple(rules)
        self._admits = tuple(r.admit for r in self.rules if not getattr(r, "passive", False))
        self._about_rows = [rule for rule in self.rules if isinstance(rule, RowsRule)]
        self._tell_limits = tell_limits
        self._told = [rule for rule in self.rules if isinstance(rule, DoneRule)]
        self._spends = [rule for rule in self.rules if isinstance(rule, SpendRule)]

    def admit(self, ask: Ask) -> Awaitable[None] | None:
        """Every rule in turn; an awaitable only if one of them has to wait."""
        for admit in self._admits:
            pending = admit(ask)
            if pending is not None:
                return _rest(pending, self._admits[self._admits.index(admit) + 1 :], ask)
        return None

    def admit_rows(self, ask: Ask) -> None:
        """Rules about the number of rows."""
        for rule in self._about_rows:
            rule.admit_rows(ask)

    def headers(self, ask: Ask) -> Headers:
        """Headers to add to the answer."""
        standing = ask.standing
        if standing is None or not self._tell_limits:
            return []
        policy, remaining, ends_s = standing
        told: Headers = policy.headers(remaining, ends_s)
        return told

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
