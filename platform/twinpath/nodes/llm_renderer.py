"""vLLM's renderer, without the waits that a short prompt has no use for.

Before vLLM's engine hears of a request, its prompt goes to a thread for the tokens and through
three gathers of a list of one: eleven turns of the event loop, each of which waits behind the
tokens of all other streams. A list of one can be awaited as it is, and a short prompt is tokenised
in less time than a thread takes to begin. What comes out is the same.
"""

import asyncio
from collections.abc import Awaitable
from types import ModuleType
from typing import Any

#: Prompts up to this length, characters, are tokenised in the event loop: some 0.2 ms.
SHORT = 2_000


def shorten(renderer: Any) -> None:
    """Let a renderer of vLLM's take the short way. One whose tokenizer only a single thread may
    use stays as it is; vLLM's own for Hugging Face tokenizers is a pool."""
    from vllm.renderers import base
    from vllm.tokenizers.hf import ThreadSafeHFTokenizerMixin

    base.asyncio = _Asyncio()
    if not isinstance(renderer.tokenizer, ThreadSafeHFTokenizerMixin):
        return
    in_thread = renderer._tokenize_prompt_async

    async def tokenize(prompt: Any, params: Any) -> Any:
        if len(prompt["prompt"]) <= SHORT:
            return renderer._tokenize_prompt(prompt, params)
        return await in_thread(prompt, params)

    renderer._tokenize_prompt_async = tokenize


class _Asyncio(ModuleType):
    """``asyncio`` as the renderer sees it."""

    def __init__(self) -> None:
        super().__init__("asyncio")

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    def gather(self, *each: Awaitable[Any], **options: Any) -> Awaitable[list[Any]]:
        """Of one, the one itself."""
        return asyncio.gather(*each, **options) if len(each) != 1 or options else _alone(each[0])


async def _alone(one: Awaitable[Any]) -> list[Any]:
    return [await one]
