"""When requests enter a busy engine: in groups, where a step that reads a prompt is long."""

import asyncio
import random
from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from twinpath.nodes.llm_admission import LONGEST_S, Admission, StepTimes, admit_in_groups


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
    engine: Admission | StepTimes,
    running: int,
    plain_s: float,
    token_s: float,
    fixed_s: float,
    later: int = 0,
    at_s: float = 0.0,
) -> float:
    """The engine reads a prompt of 20 to 60 tokens in one of three steps; what that takes shows so
    many steps later. When the last one of 1,198 ends."""
    source = random.Random(3)
    reads = [source.randint(20, 60) if source.random() < 1 / 3 else 0 for _ in range(1200)]
    for number in range(1, len(reads) - 1):
        shown = reads[number - later]
        at_s += plain_s + (fixed_s + shown * token_s if shown else 0)
        engine.saw(at_s, running, reads[number])
    return at_s


def enter(
    running: int,
    fixed_s: float,
    gap_s: float,
    token_s: float = 1e-6,
    requests: int = 60,
    together: int = 1,
) -> tuple[Core, Admission]:
    """So many requests at a time, every ``gap_s``, at an engine with such steps."""

    async def come() -> tuple[Core, Admission]:
        core = Core()
        admission = Admission(core.add, core.abort, core.failed, asyncio.get_running_loop().time)
        at_s = steps(admission, max(running, 8), 0.003, token_s, fixed_s)
        admission.saw(at_s + 0.003, running, 0)
        for number in range(requests):
            for child in range(together):
                await admission.add(SimpleNamespace(request_id=f"{number}.{child}"))
            await asyncio.sleep(gap_s)
        await asyncio.sleep(1)
        return core, admission

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(come())


async def busy() -> tuple[Core, Admission]:
    """An engine that holds requests, after twenty of them, "0" to "19", each 10 ms."""
    core = Core()
    admission = Admission(core.add, core.abort, core.failed, asyncio.get_running_loop().time)
    steps(admission, 32, 0.003, 1e-6, 0.005)
    for number in range(20):
        await admission.add(SimpleNamespace(request_id=str(number)))
        await asyncio.sleep(0.01)
    return core, admission


def names(requests: int, together: int = 1) -> list[str]:
    return [f"{number}.{child}" for number in range(requests) for child in range(together)]


def test_a_long_step_is_shared_by_those_that_come_near_each_other():
    core, admission = enter(running=32, fixed_s=0.005, gap_s=0.01)
    assert [each for entry in core.entries for each in entry] == names(60)
    sizes = [len(entry) for entry in core.entries[5:-1]]
    # Half of sqrt(2 · 32 · 5 ms · 10 ms) is 28 ms.
    assert 2.5 <= sum(sizes) / len(sizes) <= 3.5
    assert admission.held == 0


@pytest.mark.parametrize(
    ("running", "fixed_s", "gap_s", "token_s"),
    [
        (32, 0.0005, 0.01, 1e-6),  # prompts cost little, as on a CPU
        (32, 0.0, 0.01, 1e-4),  # they cost as much together as one by one
        (1, 0.005, 0.01, 1e-6),  # nobody is delayed
        (0, 0.005, 0.002, 1e-6),  # all that ran have ended
        (8, 0.005, 0.2, 1e-6),  # nobody else would come meanwhile
    ],
)
def test_where_nothing_is_spared_each_enters_at_once(
    running: int, fixed_s: float, gap_s: float, token_s: float
):
    core, _ = enter(running, fixed_s, gap_s, token_s)
    assert core.entries == [[name] for name in names(60)]


def test_those_that_come_in_the_same_moment_enter_in_the_same_moment():
    """The choices of one request, the rows of a batch: one arrival, which comes rarely."""
    core, _ = enter(running=8, fixed_s=0.005, gap_s=0.2, together=4)
    assert core.entries == [names(60, 4)[at : at + 4] for at in range(0, 240, 4)]


async def _nothing(_: object) -> None: ...


@pytest.mark.parametrize(("later", "within"), [(0, 0.03), (-1, 0.3), (1, 0.3)])
@pytest.mark.parametrize(("fixed_s", "slack_s"), [(0.005, 0.0), (0.0005, 0.0003)])
def test_times_of_steps_are_told_apart(later: int, within: float, fixed_s: float, slack_s: float):
    """Also of an engine that prepares one step during another, so that they show beside it."""
    found = StepTimes()
    steps(found, 8, 0.003, 1e-5, fixed_s, later)
    assert found.plain_s == pytest.approx(0.003, rel=within)
    # Of a prompt of usual length.
    usual_s = found.fixed_s + 40 * found.token_s
    assert usual_s == pytest.approx(fixed_s + 40e-5, rel=within, abs=slack_s)


def test_what_grows_with_tokens_is_told_from_what_does_not():
    found = StepTimes()
    steps(found, 8, 0.003, 1e-4, 0.0)
    assert found.token_s == pytest.approx(1e-4, rel=0.05)
    assert found.fixed_s < 0.0003


def test_a_slower_engine_is_known_after_some_hundred_steps():
    found = StepTimes()
    at_s = steps(found, 8, 0.003, 1e-5, 0.005)
    steps(found, 8, 0.03, 1e-5, 0.05, at_s=at_s)
    assert found.plain_s == pytest.approx(0.03, rel=0.03)
    assert found.fixed_s == pytest.approx(0.05, rel=0.1)


def test_a_stall_and_a_pause_say_nothing_of_steps():
    found = StepTimes()
    at_s = steps(found, 8, 0.003, 1e-5, 0.0005)
    before = found.plain_s, found.fixed_s
    for number in range(200):
        at_s += 10.0 if number % 50 == 25 else 0.003
        found.saw(at_s, 8, 0)
    after = found.plain_s, found.fixed_s
    assert after == pytest.approx(before, rel=0.05, abs=1e-4)
    for _ in range(50):
        found.saw(at_s + 0.003, 0, 0)  # the last token of all
        at_s += 100
        for _ in range(12):
            at_s += 0.003
            found.saw(at_s, 4, 0)
    assert found.plain_s == pytest.approx(0.003, rel=0.01)


def test_nobody_is_held_beside_an_engine_that_has_ended_its_work():
    async def come() -> float:
        loop = asyncio.get_running_loop()
        _, admission = await busy()
        await admission.add(SimpleNamespace(request_id="held"))
        assert admission.held
        began_s = loop.time()
        admission.saw(began_s, 0, 0)
        while admission.held:  # noqa: ASYNC110
            await asyncio.sleep(0)
        return loop.time() - began_s

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        assert runner.run(come()) < 0.001


def test_what_has_images_is_never_held_and_parts_of_one_prompt_keep_their_order():
    async def come() -> Core:
        core, admission = await busy()
        await admission.add(SimpleNamespace(request_id="parts"))
        await asyncio.sleep(0.002)
        await admission.add(SimpleNamespace(request_id="image", mm_features=["one"]))
        await asyncio.sleep(0.002)
        await admission.add(SimpleNamespace(request_id="parts"))
        assert admission.held >= 2
        assert core.entries[-1] == ["image"]
        await asyncio.sleep(1)
        return core

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        core = runner.run(come())
    assert core.entries[-1].count("parts") == 2


def test_nobody_waits_longer_than_the_limit():
    async def come() -> list[float]:
        loop = asyncio.get_running_loop()
        came: dict[str, float] = {}
        waits = []

        class Timed(Core):
            async def add(self, request: SimpleNamespace) -> None:
                waits.append(loop.time() - came[request.request_id])

        core = Timed()
        admission = Admission(core.add, core.abort, core.failed, loop.time)
        steps(admission, 256, 0.03, 1e-6, 0.2)
        for number in range(200):
            came[str(number)] = loop.time()
            await admission.add(SimpleNamespace(request_id=str(number)))
            await asyncio.sleep(0.005)
        await asyncio.sleep(1)
        return waits

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        waits = runner.run(come())
    assert len(waits) == 200
    assert LONGEST_S / 2 < max(waits) <= LONGEST_S + 1e-6


def test_one_that_is_aborted_while_it_is_held_never_comes():
    async def come() -> Core:
        core, admission = await busy()
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
    assert "0" in core.aborted, "the engine hears of the one that it has"


def test_one_that_cannot_be_added_later_is_told_so_and_the_others_enter():
    async def come() -> Core:
        core, admission = await busy()
        before = admission.held
        for name in ("bad", "last"):
            await admission.add(SimpleNamespace(request_id=name))
            await asyncio.sleep(0.01 if name != "bad" else 0)
        assert admission.held == before + 2
        await asyncio.sleep(1)
        return core

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        core = runner.run(come())
    assert str(core.failures["bad"]) == "cannot be sent"
    entered = [each for entry in core.entries for each in entry]
    assert entered == [*map(str, range(20)), "last"]


@pytest.mark.parametrize(
    ("graphs", "cores", "runner", "grouped"),
    [
        (True, 1, "generate", True),
        (False, 1, "generate", False),  # a CPU, or an engine without CUDA graphs
        (True, 2, "generate", False),
        (True, 1, "pooling", False),
    ],
)
def test_only_engines_whose_plain_steps_have_a_routine_of_their_own_are_asked_in_groups(
    graphs: bool, cores: int, runner: str, grouped: bool
):
    core = SimpleNamespace(add_request_async=_nothing, abort_requests_async=_nothing)
    mode = SimpleNamespace(separate_routine=lambda: graphs)
    engine = SimpleNamespace(
        engine_core=core,
        output_processor=SimpleNamespace(request_states={}),
        vllm_config=SimpleNamespace(
            compilation_config=SimpleNamespace(cudagraph_mode=mode),
            parallel_config=SimpleNamespace(data_parallel_size=cores),
            model_config=SimpleNamespace(runner_type=runner),
        ),
    )
    assert (admit_in_groups(engine) is not None) == grouped
    assert (core.add_request_async is not _nothing) == grouped
