"""Requests enter a busy engine in groups, where that spares the running ones more than it costs.

A step of an engine that reads a prompt takes longer than one that only writes on: on a GPU, where
plain steps replay a CUDA graph, two to three times as long, and hardly longer for three prompts
than for one. With short answers every other step would be such a step, if each request entered when
it came. Text Generation Inference knows this as ``waiting_served_ratio`` and ``max_waiting_tokens``
(https://huggingface.co/docs/text-generation-inference/reference/launcher), to be set by hand; here
the times are measured, and the window follows from them.

It is the economic order quantity of Harris (1913, "How many parts to make at once"): each entry
delays ``running`` sequences by ``extra_s``, each request waits half a window on average, and
``sqrt(2 * running * extra_s * gap_s)``, where requests come every ``gap_s``, makes the sum of both
least.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

#: No request is held longer, seconds.
LONGEST_S = 0.05
#: Parts by which new figures move the averages. Of the steps that read prompts the short ones count
#: more: what grows with a prompt's length is not spared by reading it together with others.
_SMOOTH, _RISE, _FALL = 0.1, 0.05, 0.2
#: A gap between requests counts for no more than so many of the usual: a pause says little.
_PAUSE = 4


class Admission:
    """Stands before the client of an engine's core: ``add`` and ``abort`` are what it has.

    `saw` is told of each step's outputs, ``failed`` of a held request that could not be added. A
    request that is held is one that the engine does not know yet: aborting it just drops it.
    """

    def __init__(
        self,
        add: Callable[[Any], Awaitable[None]],
        abort: Callable[[Sequence[str]], Awaitable[None]],
        failed: Callable[[Any, Exception], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._add, self._abort, self._failed, self._clock = add, abort, failed, clock
        self._held: dict[str, Any] = {}
        self._entry: asyncio.TimerHandle | None = None
        self._entering: asyncio.Task[None] | None = None
        self._entered_s = self._came_s = self._seen_s = -math.inf
        self._running = 0
        self._plain_s = self._extra_s = self._gap_s = 0.0

    @property
    def held(self) -> int:
        """Requests that the engine does not know yet."""
        return len(self._held)

    def saw(self, at_s: float, running: int, began: bool) -> None:
        """A step ended at ``at_s`` with a token for so many sequences; the first one if ``began``
        for some of them."""
        if running > 1 and self._running > 1:
            took_s = at_s - self._seen_s
            if not began:
                self._plain_s += (took_s - self._plain_s) * (_SMOOTH if self._plain_s else 1)
            elif self._plain_s:
                off_s = max(0.0, took_s - self._plain_s) - self._extra_s
                self._extra_s += off_s * (_RISE if off_s > 0 else _FALL)
        self._seen_s, self._running = at_s, running

    def window_s(self) -> float:
        """For how long after an entry there is no other one; 0 where that would gather nothing."""
        if self._running < 2:
            return 0.0
        best_s = math.sqrt(2 * self._running * self._extra_s * self._gap_s)
        window_s = min(best_s, LONGEST_S)
        return window_s if window_s > 2 * self._gap_s else 0.0

    async def add(self, request: Any) -> None:
        """Now, or with those that come within the window."""
        now_s = self._clock()
        gap_s, self._came_s = now_s - self._came_s, now_s
        if self._gap_s:
            self._gap_s += (min(gap_s, _PAUSE * self._gap_s) - self._gap_s) * _SMOOTH
        elif gap_s < math.inf:
            self._gap_s = gap_s
        if self._entry is None:
            wait_s = self._entered_s + self.window_s() - now_s
            if wait_s <= 0:
                self._entered_s = now_s
                await self._add(request)
                return
            self._entry = asyncio.get_running_loop().call_later(wait_s, self._enter)
        self._held[request.request_id] = request

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Those that are held never come; the others the engine has to end."""
        known = [each for each in request_ids if self._held.pop(each, None) is None]
        await self._abort(known)

    def _enter(self) -> None:
        self._entry, self._entered_s = None, self._clock()
        self._entering = asyncio.get_running_loop().create_task(self._add_all())

    async def _add_all(self) -> None:
        for each in list(self._held):
            request = self._held.pop(each, None)
            if request is None:
                continue
            try:
                await self._add(request)
            except Exception as error:
                self._failed(request, error)


def admit_in_groups(engine: Any) -> Admission | None:
    """Put an `Admission` before an ``AsyncLLM``'s core, unless it has several."""
    if engine.vllm_config.parallel_config.data_parallel_size > 1:
        return None
    core, states = engine.engine_core, engine.output_processor.request_states

    def failed(request: Any, error: Exception) -> None:
        state = states.get(request.request_id)
        if state is not None and state.queue is not None:
            state.queue.put(error)

    admission = Admission(core.add_request_async, core.abort_requests_async, failed)
    core.add_request_async, core.abort_requests_async = admission.add, admission.abort
    return admission
