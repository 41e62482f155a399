"""The swap machine as stories: events in, instructions out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinpath.registry.swap import (
    RETRY_MAX_S,
    RETRY_S,
    Desired,
    Drain,
    Drained,
    Failed,
    Load,
    Loaded,
    Policy,
    Refuse,
    Serve,
    State,
    SwapMachine,
    Tick,
    Unload,
)


def serving(version: str, policy: Policy = Policy.AVAILABILITY) -> SwapMachine:
    machine = SwapMachine(policy)
    assert machine.handle(Desired((version,)), 0) == [Load(version)]
    assert machine.handle(Loaded(version), 0) == [Serve(version)]
    return machine


def test_a_successor_is_loaded_while_the_old_version_serves_and_only_then_takes_over():
    machine = serving("1")
    assert machine.handle(Desired(("2",)), 1) == [Load("2")]
    assert machine.serving == "1"
    assert machine.handle(Loaded("2"), 2) == [Serve("2"), Drain("1")]
    assert machine.handle(Drained("1"), 3) == [Unload("1")]
    assert machine.states() == {"2": (State.READY, "", "")}


def test_a_successor_that_fails_is_refused_and_the_old_version_goes_on():
    machine = serving("1")
    machine.handle(Desired(("2",)), 1)
    assert machine.handle(Failed("2", "signature", "no column x"), 2) == [
        Refuse("2", "signature", "no column x")
    ]
    assert machine.serving == "1"
    assert machine.settled
    assert machine.handle(Tick(), 1e9) == []  # such a reason does not pass by itself


def test_to_save_memory_the_old_version_is_unloaded_first_and_nothing_serves_in_between():
    machine = serving("1", Policy.RESOURCE)
    assert machine.handle(Desired(("2",)), 1) == [Serve(None), Drain("1")]
    assert machine.handle(Tick(), 2) == []
    assert machine.handle(Drained("1"), 3) == [Unload("1"), Load("2")]
    assert machine.handle(Loaded("2"), 4) == [Serve("2")]


def test_a_challenger_is_live_beside_what_serves_and_goes_when_it_is_no_longer_wanted():
    machine = serving("1")
    assert machine.handle(Desired(("1", "2")), 1) == [Load("2")]
    assert machine.handle(Loaded("2"), 2) == []
    assert machine.serving == "1"
    assert machine.handle(Desired(("1",)), 3) == [Drain("2")]
    assert machine.handle(Drained("2"), 4) == [Unload("2")]


def test_a_challenger_that_is_promoted_takes_over_at_once():
    machine = serving("1")
    machine.handle(Desired(("1", "2")), 1)
    machine.handle(Loaded("2"), 2)
    assert machine.handle(Desired(("2",)), 3) == [Serve("2"), Drain("1")]


def test_a_reason_that_may_pass_is_tried_again_later_and_later():
    machine = serving("1")
    machine.handle(Desired(("2",)), 0)
    machine.handle(Failed("2", "registry", "down", passing=True), 0)
    assert machine.handle(Tick(), RETRY_S - 0.1) == []
    assert machine.handle(Tick(), RETRY_S) == [Load("2")]
    machine.handle(Failed("2", "registry", "down", passing=True), 10)
    assert machine.handle(Tick(), 10 + RETRY_S) == []
    assert machine.handle(Tick(), 10 + 2 * RETRY_S) == [Load("2")]
    for _ in range(20):
        machine.handle(Failed("2", "registry", "down", passing=True), 100)
        assert machine.handle(Tick(), 100 + RETRY_MAX_S) == [Load("2")]


def test_a_version_that_is_wanted_back_while_it_drains_is_loaded_again():
    machine = serving("1")
    machine.handle(Desired(("2",)), 1)
    machine.handle(Loaded("2"), 2)
    assert machine.handle(Desired(("1",)), 3) == []  # it still drains
    assert machine.handle(Drained("1"), 4) == [Unload("1"), Load("1")]
    assert machine.handle(Loaded("1"), 5) == [Serve("1"), Drain("2")]


def test_a_version_that_nobody_wants_any_more_once_it_is_loaded_never_serves():
    machine = serving("1")
    machine.handle(Desired(("2",)), 1)
    machine.handle(Desired(("1",)), 2)
    assert machine.handle(Loaded("2"), 3) == [Drain("2")]
    assert machine.serving == "1"


def test_where_nothing_serves_and_the_first_choice_is_refused_the_next_one_serves():
    machine = SwapMachine()
    machine.handle(Desired(("2", "1")), 0)
    assert machine.handle(Failed("2", "model_load", "broken"), 1)[-1] == Load("1")
    assert machine.handle(Loaded("1"), 2) == [Serve("1")]


def test_events_that_come_late_or_twice_change_nothing():
    machine = serving("1")
    assert machine.handle(Loaded("9"), 1) == []
    assert machine.handle(Drained("1"), 1) == []
    assert machine.handle(Failed("1", "x", "y"), 1) == []
    assert machine.handle(Desired(("1",)), 1) == []


versions = st.sampled_from(["1", "2", "3"])
wishes = st.lists(versions, min_size=1, max_size=3, unique=True).map(lambda v: Desired(tuple(v)))
steps = st.lists(
    st.one_of(
        wishes,
        st.just("loaded"),
        st.just("failed"),
        st.just("passing"),
        st.just("drained"),
        st.just("tick"),
    ),
    max_size=40,
)


@pytest.mark.parametrize("policy", Policy)
@given(steps=steps)
def test_only_a_loaded_version_serves_and_one_is_loaded_at_a_time(policy: Policy, steps: list):
    """What the machine says is played back as a process would do it."""
    machine, now = SwapMachine(policy), 0.0
    loading: list[str] = []
    held: set[str] = set()
    draining: list[str] = []
    answering: str | None = None

    def play(event: object) -> None:
        nonlocal answering
        for instruction in machine.handle(event, now):  # type: ignore[arg-type]
            match instruction:
                case Load(version):
                    assert not loading
                    assert version not in held
                    if policy is Policy.RESOURCE:
                        assert not draining
                    loading.append(version)
                case Serve(version):
                    assert version is None or version in held
                    answering = version
                case Drain(version):
                    assert version in held
                    assert answering != version
                    draining.append(version)
                case Unload(version):
                    held.remove(version)
                case Refuse(version, _, reason):
                    assert reason
                    assert version not in held

    for step in steps:
        now += 10.0
        if isinstance(step, Desired):
            play(step)
        elif step == "loaded" and loading:
            held.add(loading[0])
            play(Loaded(loading.pop(0)))
        elif step in ("failed", "passing") and loading:
            play(Failed(loading.pop(0), "c", "r", passing=step == "passing"))
        elif step == "drained" and draining:
            play(Drained(draining.pop(0)))
        else:
            play(Tick())
        assert machine.serving == answering
        assert answering is None or answering in held
    # Left alone, it comes to rest with what is wanted.
    for _ in range(30):
        now += RETRY_MAX_S
        if loading:
            held.add(loading[0])
            play(Loaded(loading.pop(0)))
        if draining:
            play(Drained(draining.pop(0)))
        play(Tick())
    ready = {v for v, (state, _, _) in machine.states().items() if state is State.READY}
    assert ready >= set(machine.desired) - {
        v for v, (state, _, _) in machine.states().items() if state is State.REFUSED
    }
