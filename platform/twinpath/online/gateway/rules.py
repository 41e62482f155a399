"""The gateway: a visible list of rules that every request passes, over HTTP and gRPC alike."""

from collections.abc import Awaitable, Sequence
from typing import Protocol, runtime_checkable

from twinpath.online.dataplane import Ask
from twinpath.online.exchange import Headers


class Rule(Protocol):
    """One rule. It may also have ``admit_rows(ask)``, called once ``ask.rows`` is known,
    ``headers(ask)``, headers for the answer, and ``done(ask, status, code)``, told at the end."""

    def admit(self, ask: Ask) -> Awaitable[None] | None:
        """Raises TwinpathError to refuse; may fill in ``ask``. Waits only where it has to."""


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


class Gateway:
    """`frontend.Gate` over a list of rules, in their order."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules = tuple(rules)
        self._about_rows = [rule for rule in self.rules if isinstance(rule, RowsRule)]
        self._told = [rule for rule in self.rules if isinstance(rule, DoneRule)]

    def admit(self, ask: Ask) -> Awaitable[None] | None:
        """Every rule in turn; an awaitable only if one of them has to wait."""
        for position, rule in enumerate(self.rules):
            pending = rule.admit(ask)
            if pending is not None:
                return self._rest(pending, position + 1, ask)
        return None

    async def _rest(self, pending: Awaitable[None], position: int, ask: Ask) -> None:
        await pending
        for rule in self.rules[position:]:
            waiting = rule.admit(ask)
            if waiting is not None:
                await waiting

    def admit_rows(self, ask: Ask) -> None:
        """Rules about the number of rows."""
        for rule in self._about_rows:
            rule.admit_rows(ask)

    def headers(self, ask: Ask) -> Headers:
        """Headers to add to the answer."""
        return []

    def done(self, ask: Ask, status: int, code: str) -> None:
        """The request was answered."""
        for rule in self._told:
            rule.done(ask, status, code)

    def close(self) -> None:
        """Let rules finish what they hold, such as lines of a log."""
        for rule in self.rules:
            getattr(rule, "close", lambda: None)()
