"""Requests enter a busy engine in groups, where that spares the running ones more than it costs.

A step of an engine that reads a prompt takes longer than one that only writes on: on a GPU, where
plain steps replay a CUDA graph, two to three times as long, and hardly longer for three prompts
than for one. With short answers every other step would be such a step, if each request entered when
it came. Text Generation Inference knows this as ``waiting_served_ratio`` and ``max_waiting_tokens``
(https://huggingface.co/docs/text-generation-inference/reference/launcher), to be set by hand; here
the times are measured, and the window follows from them.

It is the economic order quantity of Harris (1913, "How many parts to make at once"): each entry
delays ``running`` sequences by ``fixed_s``, each request waits half a window on average, and
``sqrt(2 * running * fixed_s * gap_s)``, where requests come every ``gap_s``, makes the sum of both
least. ``fixed_s`` is what reading takes beside what grows with the tokens that are read, which no
group spares: the intercept of a running linear regression.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

#: No request is held longer, seconds.
LONGEST_S = 0.05
#: Those that come so soon after one that entered come with it, as the choices of one request do.
TOGETHER_S = 0.001
#: Reading has to take this part of a plain step on top of it, or nobody is held.
_WORTH = 0.5
#: Part by which a new figure moves an average.
_SMOOTH = 0.1
#: A gap between requests, a plain step and one that reads count for no more than so many of the
#: usual: a pause and a stall say little.
_GAP_MAX, _PLAIN_MAX, _STEP_MAX = 4, 4, 50
#: Tokens have to differ by this part of their average to tell what a token takes.
_SPREAD = 0.2


class StepTimes:
    """What steps of an engine take, from when they end: seconds."""

    def __init__(self) -> None:
        #: A step that reads no prompt; and what reading one takes beside its tokens.
        self.plain_s = self.fixed_s = 0.0
        self.running = 0
        self._ended_s = -math.inf
        #: Of the step before: tokens read, and the time on top of a plain one.
        self._read, self._over_s = 0, 0.0
        self._tokens = self._extra_s = self._variance = self._covariance = self._token_s = 0.0

    def saw(self, at_s: float, running: int, read: int) -> None:
        """A step ended at ``at_s`` with a token for sequences of which so many go on; it read so
        many tokens of prompts that gave their first one.

        An engine that prepares one step during another may show a part of what reading takes in
        the step after it, so both are taken together.
        """
        if running > 1 and self.running > 1:
            took_s = at_s - self._ended_s
            if self.plain_s:
                took_s = min(took_s, _STEP_MAX * self.plain_s)
            over_s = took_s - self.plain_s
            if not read and not self._read:
                most_s = (_PLAIN_MAX - 1) * self.plain_s
                self.plain_s += min(over_s, most_s) * _SMOOTH if self.plain_s else over_s
            elif not read and self.plain_s:
                self._learn(self._read, self._over_s + over_s)
            self._over_s = over_s
            self._read = read
        else:
            self._read = 0
        self._ended_s, self.running = at_s, running

    def _learn(self, tokens: int, extra_s: float) -> None:
        off = tokens - self._tokens
        off_s = extra_s - self._extra_s
        smooth = _SMOOTH if self._tokens else 1.0
        self._tokens += smooth * off
        self._extra_s += smooth * off_s
        if smooth < 1:
            self._variance += _SMOOTH * (off * off - self._variance)
            self._covariance += _SMOOTH * (off * off_s - self._covariance)
        if self._variance > (_SPREAD * self._tokens) ** 2:
            self._token_s = max(0.0, self._covariance / self._variance)
        self.fixed_s = max(0.0, self._extra_s - self._token_s * self._tokens)


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
        best_s = math.sqrt(2 * steps.running * steps.fixed_s * self._gap_s)
        window_s = min(best_s, LONGEST_S)
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
    """Put an `Admission` before an ``AsyncLLM``'s core; not where there are several, and not where
    it only reads."""
    config = engine.vllm_config
    if (
        config.parallel_config.data_parallel_size > 1
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
