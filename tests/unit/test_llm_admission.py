"""When requests enter a busy engine: in groups, where a step that reads a prompt is long."""

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from twinpath.nodes.llm_admission import LONGEST_S, Admission


class Core:
    """What stands behind: notes what comes, and when."""

    def __init__(self) -> None:
        self.entries: list[list[str]] = []
        self.aborted: list[str] = []
        self.failures: dict[str, Exception] = {}
        self._at_s = -1.0

    def failed(self, request: SimpleNamespace, error: Exception) -> None:
        self.failures[request.request_id] = error

    async def add(self, request: SimpleNamespace) -> None:
        if request.request_id == "bad":
            raise ValueError("cannot be sent")
        now_s = asyncio.get_running_loop().time()
        if now_s - self._at_s > 0.001:
            self.entries.append([])
        self._at_s = now_s
        self.entries[-1].append(request.request_id)

    async def abort(self, request_ids: Sequence[str]) -> None:
        self.aborted.extend(request_ids)


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop whose time passes only when it would have to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        select = self._selector.select  # type: ignore[attr-defined]

        def passing(timeout: float | None) -> list[object]:
            self.now_s += max(0.0, timeout or 0.0)
            return select(0)  # type: ignore[no-any-return]

        self._selector.select = passing  # type: ignore[attr-defined]

    def time(self) -> float:
        """Seconds that have passed."""
        return self.now_s


def steps(
    admission: Admission, running: int, plain_s: float, prompt_s: float, many: int = 200
) -> None:
    """Every other step of the engine reads a prompt."""
    at_s = 0.0
    for number in range(many):
        at_s += plain_s if number % 2 else prompt_s
        admission.saw(at_s, running, number % 2 == 0)


def enter(
    running: int, prompt_s: float, gap_s: float, requests: int = 60, plain_s: float = 0.003
) -> tuple[Core, Admission]:
    """Requests that come every ``gap_s`` at an engine with such steps."""

    async def come() -> tuple[Core, Admission]:
        core = Core()
        admission = Admission(core.add, core.abort, core.failed, asyncio.get_running_loop().time)
        steps(admission, running, plain_s, prompt_s)
        for number in range(requests):
            await admission.add(SimpleNamespace(request_id=str(number)))
            await asyncio.sleep(gap_s)
        await asyncio.sleep(1)
        return core, admission

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(come())


def test_a_long_step_is_shared_by_those_that_come_near_each_other():
    core, admission = enter(running=32, prompt_s=0.008, gap_s=0.01)
    assert [each for entry in core.entries for each in entry] == [str(n) for n in range(60)]
    sizes = [len(entry) for entry in core.entries[5:-1]]
    # sqrt(2 · 32 · 5 ms · 10 ms) = 57 ms, held to LONGEST_S
    assert 4 <= sum(sizes) / len(sizes) <= 6
    assert admission.held == 0


@pytest.mark.parametrize(
    ("running", "prompt_s", "gap_s"),
    [
        (32, 0.003, 0.01),  # prompts cost nothing, as on a CPU
        (1, 0.008, 0.01),  # nobody is delayed
        (8, 0.008, 0.2),  # nobody else would come meanwhile
    ],
)
def test_where_nothing_is_spared_each_enters_at_once(running: int, prompt_s: float, gap_s: float):
    core, _ = enter(running, prompt_s, gap_s)
    assert core.entries == [[str(number)] for number in range(60)]


def test_nobody_waits_longer_than_the_limit():
    async def come() -> float:
        core = Core()
        loop = asyncio.get_running_loop()
        admission = Admission(core.add, core.abort, core.failed, loop.time)
        steps(admission, 256, 0.03, 0.9)
        for number in range(40):
            await admission.add(SimpleNamespace(request_id=str(number)))
            await asyncio.sleep(0.005)
        longest = 0.0
        while admission.held:
            before = loop.time()
            while admission.held and loop.time() - before < 1:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            longest = max(longest, loop.time() - before)
        return longest

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        assert runner.run(come()) <= LONGEST_S + 0.002


def test_an_idle_engine_gets_what_comes():
    core, _ = enter(running=0, prompt_s=0.008, gap_s=0.002)
    assert len(core.entries) == 60


def test_one_that_is_aborted_while_it_is_held_never_comes():
    async def come() -> Core:
        core = Core()
        admission = Admission(core.add, core.abort, core.failed, asyncio.get_running_loop().time)
        steps(admission, 32, 0.003, 0.008)
        for number in range(20):
            await admission.add(SimpleNamespace(request_id=str(number)))
            await asyncio.sleep(0.01)
        await admission.add(SimpleNamespace(request_id="first"))
        await admission.add(SimpleNamespace(request_id="gone"))
        assert admission.held >= 1
        await admission.abort(["gone", "0"])
        await asyncio.sleep(1)
        return core

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        core = runner.run(come())
    came = [each for entry in core.entries for each in entry]
    assert "first" in came
    assert "gone" not in came
    assert core.aborted == ["0"], "the engine hears of the one that it has"


def test_one_that_cannot_be_added_later_is_told_so_and_the_others_enter():
    async def come() -> Core:
        core = Core()
        admission = Admission(core.add, core.abort, core.failed, asyncio.get_running_loop().time)
        steps(admission, 32, 0.003, 0.008)
        for name in [*map(str, range(20)), "bad", "last"]:
            await admission.add(SimpleNamespace(request_id=name))
            await asyncio.sleep(0.01 if name != "bad" else 0)
        assert admission.held == 2
        await asyncio.sleep(1)
        return core

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        core = runner.run(come())
    assert str(core.failures["bad"]) == "cannot be sent"
    assert core.entries[-1] == ["last"]
