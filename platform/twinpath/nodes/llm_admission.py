"""Requests enter a busy engine in groups, where that spares the running ones more than it costs.

A step of an engine that reads a prompt takes longer than one that only writes on: on a GPU, where
plain steps replay a CUDA graph, two to three times as long, and hardly longer for three prompts
than for one. With short answers every other step would be such a step, if each request entered when
it came. Text Generation Inference knows this as ``waiting_served_ratio`` and ``max_waiting_tokens``
(https://huggingface.co/docs/text-generation-inference/reference/launcher), to be set by hand; here
the times are measured, and the window follows from them.

Each entry delays ``running`` sequences by ``fixed_s``, what reading takes beside what grows with
the tokens that are read and no group spares; each request waits half a window on average. Where
requests come every ``gap_s``, ``sqrt(2 * running * fixed_s * gap_s)`` makes the sum of both least:
the economic order quantity of Harris (1913, "How many parts to make at once"). The minimum is flat:
half of that adds a quarter to the sum but halves the wait for the first token, which is what a
caller sees, so that is what is taken.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
from scipy.optimize import nnls

#: No request is held longer, seconds.
LONGEST_S = 0.05
#: Those that come so soon after one that entered come with it, as the choices of one request do.
TOGETHER_S = 0.001
#: Reading has to take this part of a plain step on top of it, or nobody is held.
_WORTH = 0.75
#: Part by which a new gap between requests moves the average of them, and how many of it one counts
#: for at most: a pause says little.
_SMOOTH, _GAP_MAX = 0.1, 4
#: Of the window that makes the sum least.
_PART = 0.5
#: Steps that are looked at together: an engine that prepares one step during another shows a part
#: of what reading takes in the step before or after.
_BLOCK = 8
#: Blocks that are remembered.
_BLOCKS = 50
#: What speaks against a figure that the blocks do not show, beside them.
_SLIGHT = 0.1


class StepTimes:
    """What steps of an engine take, from when they end: seconds.

    A linear regression of the time of _BLOCK steps on how many of them read a prompt and how many
    tokens those read, over the last blocks: least squares of parts of the time, so that a stall
    says little, and without negative figures (Lawson and Hanson 1974, `scipy.optimize.nnls`).
    """

    def __init__(self) -> None:
        #: A step that reads no prompt; and what reading takes on top, in itself and for each token.
        self.plain_s = self.fixed_s = self.token_s = 0.0
        self.running = 0
        self._ended_s = -math.inf
        self._steps = self._reads = self._tokens = 0
        self._took_s = 0.0
        self._blocks: deque[tuple[float, float, float]] = deque(maxlen=_BLOCKS)

    def saw(self, at_s: float, running: int, read: int) -> None:
        """A step ended at ``at_s`` with a token for sequences of which so many go on; it read so
        many tokens of prompts that gave their first one."""
        if running > 1 and self.running > 1:
            self._steps += 1
            self._reads += read > 0
            self._tokens += read
            self._took_s += at_s - self._ended_s
            if self._steps == _BLOCK:
                if self._took_s > 0:
                    self._learn()
                self._forget_block()
        else:
            self._forget_block()
        self._ended_s, self.running = at_s, running

    def _forget_block(self) -> None:
        self._steps = self._reads = self._tokens = 0
        self._took_s = 0.0

    def _learn(self) -> None:
        took_s = self._took_s
        self._blocks.append((self._steps / took_s, self._reads / took_s, self._tokens / took_s))
        blocks = np.array(self._blocks)
        steps, reads, tokens = blocks.sum(axis=0)
        # What a token takes shows where steps that read differ in theirs; else it counts for
        # nothing of its own. The same for reading at all.
        slight = _SLIGHT * steps / math.sqrt(len(blocks)) / _BLOCK
        against = [(0, slight, 0), (0, 0, slight * max(1.0, tokens / max(reads, 1e-9)))]
        aims = [1.0] * len(blocks) + [0.0, 0.0]
        found, _ = nnls(np.vstack((blocks, against)), aims, maxiter=100)
        self.plain_s, self.fixed_s, self.token_s = found.tolist()


class Admission:
    """Stands before the client of an engine's core: ``add`` and ``abort`` are what it has.

    `saw` is told of each step's outputs, ``failed`` of a held request that could not be added. A
    request that is held is one that the engine does not know yet.
    """

    def __init__(
        self,
        add: Callable[[Any], Awaitable[None]],
        abort: Callable[[Sequence[str]], Awaitable[None]],
        failed: Callable[[Any, Exception], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._add, self._abort, self._failed, self._clock = add, abort, failed, clock
        self.steps = StepTimes()
        #: In the order in which they came. One id may come several times, with more of its prompt.
        self._held: deque[Any] = deque()
        self._entry: asyncio.TimerHandle | None = None
        self._entering: asyncio.Task[None] | None = None
        self._entered_s = self._came_s = -math.inf
        self._gap_s = 0.0

    @property
    def held(self) -> int:
        """Requests that the engine does not know yet."""
        return len(self._held)

    def saw(self, at_s: float, running: int, read: int) -> None:
        """As `StepTimes.saw`. Nobody is held beside an engine that has nothing else to do."""
        self.steps.saw(at_s, running, read)
        if running < 2 and self._entry is not None:
            self._entry.cancel()
            self._enter()

    def window_s(self) -> float:
        """For how long after an entry there is no other one; 0 where that would gather nothing."""
        steps = self.steps
        if steps.running < 2 or steps.fixed_s < _WORTH * steps.plain_s:
            return 0.0
        least_s = math.sqrt(2 * steps.running * steps.fixed_s * self._gap_s)
        window_s = min(_PART * least_s, LONGEST_S)
        return window_s if window_s > 2 * self._gap_s else 0.0

    async def add(self, request: Any) -> None:
        """Now, or with those that come within the window."""
        now_s = self._clock()
        gap_s, self._came_s = now_s - self._came_s, now_s
        together = gap_s < TOGETHER_S
        if not together:
            self._count(gap_s)
        wait_s = self._entered_s + self.window_s() - now_s
        # Of images vLLM has noted already that the engine has them: none may be dropped.
        if getattr(request, "mm_features", None) or (not self._held and (wait_s <= 0 or together)):
            self._entered_s = now_s
            await self._add(request)
            return
        if not self._held:
            self._entry = asyncio.get_running_loop().call_later(wait_s, self._enter)
        self._held.append(request)

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Those that are held never come; an engine passes over what it does not know."""
        if self._held:
            gone = set(request_ids)
            self._held = deque(each for each in self._held if each.request_id not in gone)
        await self._abort(request_ids)

    def _count(self, gap_s: float) -> None:
        if self._gap_s:
            self._gap_s += (min(gap_s, _GAP_MAX * self._gap_s) - self._gap_s) * _SMOOTH
        elif gap_s < math.inf:
            self._gap_s = gap_s

    def _enter(self) -> None:
        self._entry = None
        if self._held:
            self._entered_s = self._clock()
            self._entering = asyncio.get_running_loop().create_task(self._add_all())

    async def _add_all(self) -> None:
        while self._held:
            request = self._held.popleft()
            try:
                await self._add(request)
            except Exception as error:
                self._failed(request, error)


def admit_in_groups(engine: Any) -> Admission | None:
    """Put an `Admission` before an ``AsyncLLM``'s core where steps that read a prompt have a
    routine of their own, as beside CUDA graphs of whole steps; not where there are several cores,
    and not where they only read."""
    config = engine.vllm_config
    if (
        not config.compilation_config.cudagraph_mode.separate_routine()
        or config.parallel_config.data_parallel_size > 1
        or config.model_config.runner_type == "pooling"
    ):
        return None
    core, states = engine.engine_core, engine.output_processor.request_states

    def failed(request: Any, error: Exception) -> None:
        state = states.get(request.request_id)
        if state is not None and state.queue is not None:
            state.queue.put(error)

    admission = Admission(core.add_request_async, core.abort_requests_async, failed)
    core.add_request_async, core.abort_requests_async = admission.add, admission.abort
    return admission
