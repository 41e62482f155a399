"""Tokens that a request costs, counted where the engine gives them out.

Whoever wants to know (the OpenAI API, for the gateway's token limits) sets `USAGE` before it calls
an engine in the same task; tasks that it starts inherit it. Rows of a graph are of several callers
and may be computed elsewhere: what each costs goes along with it, as a note.
"""

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass

from twinpath.graph.columns import NOTE, Columns, Outcome, Rows

_TOKENS = "tokens"
#: The column of a node's answer with the tokens that each row cost.
COST = NOTE + _TOKENS


@dataclass(slots=True)
class Usage:
    """Tokens read and written on behalf of one request so far."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Both."""
        return self.prompt_tokens + self.completion_tokens


def tokens_of(outcome: Outcome) -> int:
    """Tokens that the rows of an outcome cost, in all nodes."""
    return tokens_noted(outcome.notes)


def tokens_noted(notes: Mapping[str, tuple[Rows, Columns]]) -> int:
    """The same of notes by node."""
    noted = [columns for _, columns in notes.values()]
    return sum(int(columns[_TOKENS].sum()) for columns in noted if _TOKENS in columns)


#: Where engines add what the current request costs; None where nobody counts.
USAGE: ContextVar[Usage | None] = ContextVar("twinpath_llm_usage", default=None)
