"""Tokens that a request costs, counted where the engine gives them out.

Whoever wants to know (the gateway's token limits) sets `USAGE` before it calls an engine in the
same task; tasks that it starts inherit it.
"""

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(slots=True)
class Usage:
    """Tokens read and written on behalf of one request so far."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Both."""
        return self.prompt_tokens + self.completion_tokens


#: Where engines add what the current request costs; None where nobody counts.
USAGE: ContextVar[Usage | None] = ContextVar("twinpath_llm_usage", default=None)
