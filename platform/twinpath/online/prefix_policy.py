"""Which engine replica a prompt goes to: pure policy, no Ray and no clock.

An engine with prefix caching computes a prompt's beginning once, if the prompts that share it come
to the same replica. So a prompt goes where the longest part of its beginning went before, unless
that replica has ``slack`` more under way than the least loaded one: bounded loads, as in Mirrokni,
Thorup and Zadimoghaddam 2018 (arXiv:1608.01350). It then spills over to the least loaded replica,
which from then on holds that beginning too. Sessions stay with their replica under the same bound.
Prompts shorter than a block share nothing that an engine keeps: they take turns.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

R = TypeVar("R")


@dataclass
class PrefixPolicy(Generic[R]):
    """Chooses among replicas ``R`` (anything hashable) and counts what is under way at each.

    ``block_chars`` is the unit in which beginnings are compared, in characters (an engine keeps
    whole blocks of tokens; a token is some 4 characters); ``slack`` is in requests; ``capacity`` is
    how many beginnings and sessions are remembered, the least recently used of which are forgotten.
    """

    block_chars: int = 64
    slack: int = 8
    capacity: int = 65_536
    _homes: "OrderedDict[int, dict[R, None]]" = field(default_factory=OrderedDict)
    _sessions: "OrderedDict[str, R]" = field(default_factory=OrderedDict)
    _running: dict[str, R] = field(default_factory=dict)
    _turn: int = 0

    def choose(
        self, request: str, prompt: str, replicas: Iterable[R], session: str | None = None
    ) -> R:
        """The replica for request id ``request``, which is under way there until it is ``ended``.

        Raises ValueError without replicas.
        """
        present = list(replicas)
        if not present:
            raise ValueError("there is no replica to choose from")
        self.ended(request)
        loads = dict.fromkeys(present, 0)
        for replica in self._running.values():
            if replica in loads:
                loads[replica] += 1
        bound = min(loads.values()) + self.slack
        blocks = self._blocks(prompt)
        chosen = self._of_session(session, loads, bound)
        if chosen is None:
            chosen = self._of_prefix(blocks, loads, bound)
        if chosen is None:
            chosen = self._in_turn(loads)
        self._remember(blocks, session, chosen)
        self._running[request] = chosen
        return chosen

    def moved(self, request: str, replica: R) -> None:
        """The request went to another replica than was chosen."""
        if request in self._running:
            self._running[request] = replica

    def ended(self, request: str) -> None:
        """The request was answered, failed or was given up. Harmless when it is not known."""
        self._running.pop(request, None)

    def load(self, replica: R) -> int:
        """Requests under way at a replica."""
        return sum(where == replica for where in self._running.values())

    def _blocks(self, prompt: str) -> list[int]:
        """A key for each whole block: of the text up to its end."""
        keys, key = [], 0
        for start in range(0, len(prompt) - self.block_chars + 1, self.block_chars):
            key = hash((key, prompt[start : start + self.block_chars]))
            keys.append(key)
        return keys

    def _of_session(self, session: str | None, loads: dict[R, int], bound: int) -> R | None:
        home = None if session is None else self._sessions.get(session)
        return home if home is not None and loads.get(home, bound + 1) <= bound else None

    def _of_prefix(self, blocks: list[int], loads: dict[R, int], bound: int) -> R | None:
        for key in reversed(blocks):
            homes = [home for home in self._homes.get(key, ()) if home in loads]
            if homes:
                best = min(homes, key=lambda home: loads[home])
                return best if loads[best] <= bound else None
        return None

    def _in_turn(self, loads: dict[R, int]) -> R:
        """The least loaded; among equals, each in its turn."""
        least = min(loads.values())
        equals = [replica for replica, load in loads.items() if load == least]
        self._turn += 1
        return equals[self._turn % len(equals)]

    def _remember(self, blocks: list[int], session: str | None, replica: R) -> None:
        for key in blocks:
            self._homes.setdefault(key, {})[replica] = None
            self._homes.move_to_end(key)
        while len(self._homes) > self.capacity:
            self._homes.popitem(last=False)
        if session is not None:
            self._sessions[session] = replica
            self._sessions.move_to_end(session)
            if len(self._sessions) > self.capacity:
                self._sessions.popitem(last=False)
