"""Tokens that a request costs, counted where the engine gives them out.

Whoever wants to know (the OpenAI API, for the gateway's token limits) sets `USAGE` before it calls
an engine in the same task; tasks that it starts inherit it. Rows of a graph are of several callers
and may be computed elsewhere: what each costs goes along with it, as a note.
"""

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from twinpath.graph.columns import NOTE, Outcome

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
    noted = [columns for _, columns in outcome.notes.values()]
    return sum(int(columns[_TOKENS].sum()) for columns in noted if _TOKENS in columns)


#: Where engines add what the current request costs; None where nobody counts.
USAGE: ContextVar[Usage | None] = ContextVar("twinpath_llm_usage", default=None)


def count_tokens() -> None:
    """Let vLLM's engines of this process add what they give out to `USAGE`.

    Counted where the engine hands outputs over to a request: one more layer of generators around
    each request would cost every token more than the counting does.
    """
    from vllm.outputs import PoolingRequestOutput
    from vllm.v1.engine import async_llm

    if hasattr(async_llm.RequestOutputCollector, "counts"):
        return

    class Counting(async_llm.RequestOutputCollector):
        counts = True

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self._usage = USAGE.get()
            self._prompt_tokens = 0
            #: By choice, where outputs have all tokens so far.
            self._written: dict[int, int] = {}

        def put(self, output: Any) -> None:
            if self._usage is not None and not isinstance(output, Exception):
                self._count(self._usage, output)
            super().put(output)

        def _count(self, usage: Usage, output: Any) -> None:
            if not self._prompt_tokens and output.prompt_token_ids:
                self._prompt_tokens = len(output.prompt_token_ids)
                usage.prompt_tokens += self._prompt_tokens
            if isinstance(output, PoolingRequestOutput):
                return
            for choice in output.outputs:
                count = len(choice.token_ids)
                if not self.aggregate:
                    before = self._written.get(choice.index, 0)
                    self._written[choice.index] = count
                    count -= before
                usage.completion_tokens += count

    async_llm.RequestOutputCollector = Counting
