"""vLLM's frontend, with less to wait for and to do. What comes out is the same."""

import asyncio
import functools
import itertools
from collections.abc import Awaitable, Callable, Coroutine, Generator, Sequence
from types import ModuleType
from typing import Any

from twinpath.nodes.llm_usage import USAGE, Usage

#: Prompts up to this length, characters, are tokenised in the event loop: some 0.2 ms.
SHORT = 2_000


def shorten(renderer: Any) -> None:
    """Let a renderer of vLLM's take a short way with short prompts.

    Before vLLM's engine hears of a request, its prompt goes to a thread for the tokens and through
    three gathers of a list of one: eleven turns of the event loop, each of which waits behind the
    tokens of all other streams. A list of one can be awaited as it is, and a short prompt is
    tokenised in less time than a thread takes to begin. Not where only a single thread may use the
    tokenizer; vLLM's own for Hugging Face tokenizers is a pool.
    """
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


def first_tokens_first(engine: Any, saw: Callable[[float, int, int], None] | None = None) -> None:
    """Let an ``AsyncLLM`` hand out the first token of a request before the next ones of others:
    the engine lists those that came last, last. ``saw`` is told of each step: when it ended, how
    many sequences of it go on, how many tokens the prompts have that it gave a first one for."""
    core, states = engine.engine_core, engine.output_processor.request_states
    get = core.get_output_async

    def begun(output: Any) -> bool:
        state = states.get(output.request_id)
        return state is None or not state.is_prefilling

    async def ordered() -> Any:
        outputs = await get()
        each = outputs.outputs
        each.sort(key=begun)
        if saw is not None and each:
            new = itertools.takewhile(lambda output: not begun(output), each)
            read = sum(states[output.request_id].prompt_len for output in new)
            going_on = sum(output.finish_reason is None for output in each)
            saw(outputs.timestamp, going_on, read)
        return outputs

    core.get_output_async = ordered


def start_at_once() -> None:
    """Let vLLM's endpoints begin in the task that calls them. Each runs in a task of its own,
    beside one that looks out for the caller's leaving: three turns more of the event loop, also
    where the endpoint has nothing to wait for, as one that answers with a stream."""
    from vllm.entrypoints.serve.utils import api_utils

    api_utils.asyncio = _Eager()


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


class _Eager(_Asyncio):
    """``asyncio`` as what watches endpoints sees it. Python has such tasks from 3.12 on."""

    def create_task(self, coroutine: Coroutine[Any, Any, Any]) -> "asyncio.Future[Any]":
        """A task that has begun, or a future if that was all there was to do."""
        try:
            waits_for = coroutine.send(None)
        except StopIteration as ended:
            done = asyncio.get_running_loop().create_future()
            done.set_result(ended.value)
            return done
        except Exception as error:
            failed = asyncio.get_running_loop().create_future()
            failed.set_exception(error)
            return failed
        task = asyncio.create_task(_rest(coroutine, waits_for))
        # One that is cancelled before its first step would leave the coroutine where it is.
        task.add_done_callback(lambda _: coroutine.close())
        return task

    async def wait(
        self, each: Sequence["asyncio.Future[Any]"], **options: Any
    ) -> tuple[set["asyncio.Future[Any]"], set["asyncio.Future[Any]"]]:
        """Without waiting, where one is done."""
        done = {one for one in each if one.done()}
        if not done:
            return await asyncio.wait(each, **options)
        return done, {*each} - done


async def _rest(coroutine: Coroutine[Any, Any, Any], waits_for: Any) -> Any:
    return await _Rest(coroutine, waits_for)


class _Rest:
    """What is left of a coroutine that has begun and waits for something."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], waits_for: Any) -> None:
        self._coroutine, self._waits_for = coroutine, waits_for

    def __await__(self) -> Generator[Any, Any, Any]:
        waits_for = self._waits_for
        while True:
            try:
                given = yield waits_for
            except BaseException as error:
                step = functools.partial(self._coroutine.throw, error)
            else:
                step = functools.partial(self._coroutine.send, given)
            try:
                waits_for = step()
            except StopIteration as ended:
                return ended.value


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
