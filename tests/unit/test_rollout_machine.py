"""Stories of rollouts: events in, instructions out."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twinpath.errors import ConfigError
from twinpath.rollout.audit import encode
from twinpath.rollout.bins import Bins
from twinpath.rollout.machine import (
    Audit,
    Command,
    Judged,
    Operator,
    Recovered,
    Refuse,
    Save,
    SetAlias,
    advance,
    start,
)
from twinpath.rollout.mirror import MirrorBudget
from twinpath.rollout.state import LARGEST_TAG, Ending, Kind, RolloutState, Status, Thresholds
from twinpath.rollout.verdict import Action, Finding, Verdict


def asked(**changes):
    return RolloutState(id="r1", model="delay", incumbent="3", challenger="4").but(**changes)


def judged(state, action, now_s=100.0, reason="figures"):
    finding = Finding("score PSI", 0.4, 0.3, 0.25, 20.0, 7.6, 1000, 500)
    return Judged(Verdict(action, reason, state.id, state.step, now_s, (finding,)))


def promoted(state, now_s=100.0):
    return advance(state, judged(state, Action.PROMOTE, now_s))


def kinds(transition):
    return [type(one) for one in transition.instructions]


def saved(transition):
    return [one.state for one in transition.instructions if isinstance(one, Save)]


def lines(transition):
    return [one.line for one in transition.instructions if isinstance(one, Audit)]


class World:
    """The registry and the audit log: what instructions act on, one after the other."""

    def __init__(self, state):
        self.tag = state.to_tag()
        self.aliases = {"champion": state.incumbent}
        self.refused = {}
        self.log = {}

    def do(self, instruction):
        if isinstance(instruction, Save):
            self.tag = instruction.state.to_tag()
        elif isinstance(instruction, SetAlias):
            self.aliases[instruction.alias] = instruction.version
        elif isinstance(instruction, Refuse):
            self.refused[instruction.version] = instruction.reason
        else:
            self.log[instruction.line["id"]] = instruction.line

    @property
    def state(self):
        return RolloutState.from_tag(self.tag)

    @property
    def facts(self):
        return self.state, self.aliases, self.refused


def test_a_good_challenger_goes_up_the_steps_and_becomes_the_champion():
    moved = start(asked(), now_s=10.0, by="ana")
    assert kinds(moved) == [Audit, Save]
    assert (moved.state.step, moved.state.share, moved.state.step_started_s) == (0, 0.05, 10.0)
    assert lines(moved)[0]["by"] == "ana"
    shares = []
    state = moved.state
    for now_s in (100.0, 200.0, 300.0):
        moved = promoted(state, now_s)
        assert kinds(moved) == [Audit, Save]
        state = moved.state
        assert state.step_started_s == now_s
        shares.append(state.share)
    assert shares == [0.25, 0.5, 1.0]
    end = promoted(state, 400.0)
    # Decided and saved, then acted on, then saved as done: traffic is never without a version.
    assert kinds(end) == [Audit, Save, SetAlias, Audit, Save]
    decided, done = saved(end)
    assert (decided.ending, decided.share, decided.live) == (Ending.PROMOTE, 1.0, True)
    assert end.instructions[2] == SetAlias("delay", "champion", "4")
    assert (done.status, done.ending, done.live) == (Status.PROMOTED, None, False)
    assert done == end.state


def test_a_bad_challenger_loses_its_traffic_first_and_is_refused_with_the_reason():
    state = promoted(start(asked(), 10.0).state).state
    end = advance(state, judged(state, Action.ROLL_BACK, reason="score PSI where carrier=UA: 0.9"))
    assert kinds(end) == [Audit, Save, Refuse, SetAlias, Audit, Save]
    decided, done = saved(end)
    assert (decided.share, decided.mirror, decided.ending) == (0.0, 0.0, Ending.ROLL_BACK)
    assert end.instructions[2] == Refuse("delay", "4", "score PSI where carrier=UA: 0.9")
    assert end.instructions[3] == SetAlias("delay", "champion", "3")
    assert done.status is Status.ROLLED_BACK
    assert done.reason == "score PSI where carrier=UA: 0.9"
    assert lines(end)[0]["evidence"][0]["check"] == "score PSI"


def test_a_canary_may_be_shadowed_first():
    moved = start(asked(shadow_first=0.5), 10.0)
    assert (moved.state.step, moved.state.share, moved.state.mirror) == (-1, 0.0, 0.5)
    moved = promoted(moved.state)
    assert (moved.state.step, moved.state.share, moved.state.mirror) == (0, 0.05, 0.0)


def test_a_shadow_answers_nobody_and_ends_by_an_operator():
    state = start(asked(kind=Kind.SHADOW, steps=(0.2,)), 10.0).state
    assert (state.share, state.mirror) == (0.0, 0.2)
    assert promoted(state).instructions == ()
    end = advance(state, Operator(Command.ABORT, 50.0, by="ana"))
    assert end.state.status is Status.ABORTED
    assert not any(isinstance(one, Refuse) for one in end.instructions)


def test_an_ab_test_keeps_its_share_until_an_operator_decides():
    state = start(asked(kind=Kind.AB, steps=(0.5,)), 10.0).state
    assert state.share == 0.5
    assert promoted(state).instructions == ()
    assert advance(state, judged(state, Action.ROLL_BACK)).state.status is Status.ROLLED_BACK
    end = advance(state, Operator(Command.PROMOTE, 60.0, by="ana", reason="sells more"))
    assert end.state.status is Status.PROMOTED
    assert lines(end)[0]["reason"] == "sells more"


def test_a_hold_changes_nothing():
    state = start(asked(), 10.0).state
    moved = advance(state, judged(state, Action.HOLD))
    assert (moved.state, moved.instructions) == (state, ())


def test_a_pause_stops_steps_but_not_a_roll_back_and_time_begins_again():
    state = start(asked(), 10.0).state
    paused = advance(state, Operator(Command.PAUSE, 20.0, by="ana")).state
    assert (paused.status, paused.share) == (Status.PAUSED, 0.05)
    assert promoted(paused).instructions == ()
    assert advance(paused, Operator(Command.PAUSE, 21.0)).instructions == ()
    resumed = advance(paused, Operator(Command.RESUME, 500.0)).state
    assert (resumed.status, resumed.step_started_s) == (Status.RUNNING, 500.0)
    assert advance(paused, judged(paused, Action.ROLL_BACK)).state.status is Status.ROLLED_BACK


def test_a_verdict_on_another_step_or_rollout_does_not_count():
    state = start(asked(), 10.0).state
    old = judged(state, Action.PROMOTE)
    moved = advance(state, old).state
    assert advance(moved, old).instructions == ()
    other = start(asked(id="r2"), 10.0).state
    assert advance(other, judged(state, Action.ROLL_BACK)).instructions == ()


@pytest.mark.parametrize("command", list(Command))
def test_a_rollout_that_is_over_takes_no_command(command):
    state = advance(start(asked(), 1.0).state, Operator(Command.ABORT, 2.0)).state
    with pytest.raises(ConfigError, match="'r1' of 'delay' is over \\(aborted\\)"):
        advance(state, Operator(command, 3.0))
    assert advance(state, judged(state, Action.PROMOTE)).instructions == ()
    assert advance(state, Recovered(4.0)).instructions == ()


def test_a_rollout_that_has_begun_is_not_started_again():
    state = start(asked(), 10.0).state
    with pytest.raises(ConfigError, match="has begun"):
        start(state, 20.0)


def endings():
    state = start(asked(), 10.0).state
    last = state
    for _ in range(3):
        last = promoted(last).state
    return {
        "promoted": (last, judged(last, Action.PROMOTE)),
        "rolled back": (state, judged(state, Action.ROLL_BACK)),
        "promoted by hand": (state, Operator(Command.PROMOTE, 50.0)),
        "aborted": (state, Operator(Command.ABORT, 50.0)),
        "rolled back by hand": (state, Operator(Command.ROLL_BACK, 50.0)),
    }


@pytest.mark.parametrize("name", list(endings()))
def test_a_crash_between_any_two_instructions_leads_to_the_same_end(name):
    before, event = endings()[name]
    whole = advance(before, event)
    ideal = World(before)
    for instruction in whole.instructions:
        ideal.do(instruction)
    assert ideal.state == whole.state
    for done in range(len(whole.instructions) + 1):
        world = World(before)
        for instruction in whole.instructions[:done]:
            world.do(instruction)
        # The controller is gone; the next one has only what was saved.
        recovered = advance(world.state, Recovered(99.0))
        for crash in range(len(recovered.instructions) + 1):
            again = World(world.state)
            again.aliases, again.refused = dict(world.aliases), dict(world.refused)
            for instruction in recovered.instructions[:crash]:
                again.do(instruction)
            for instruction in advance(again.state, Recovered(101.0)).instructions:
                again.do(instruction)
            if again.state == before:  # nothing was decided yet: the event comes again
                for instruction in advance(again.state, event).instructions:
                    again.do(instruction)
            assert again.facts == ideal.facts
            assert again.state.live is False


def test_carrying_out_instructions_twice_changes_nothing():
    for before, event in endings().values():
        once, twice = World(before), World(before)
        for instruction in advance(before, event).instructions:
            once.do(instruction)
            twice.do(instruction)
            twice.do(instruction)
        assert once.facts == twice.facts
        assert once.log.keys() == twice.log.keys()


actions = st.lists(
    st.one_of(
        st.sampled_from(list(Action)),
        st.sampled_from(list(Command)),
        st.just("recovered"),
    ),
    max_size=25,
)


@settings(max_examples=200, deadline=None)
@given(actions, st.sampled_from(list(Kind)), st.sampled_from([0.0, 0.3]))
def test_whatever_happens_shares_and_alias_fit_together(events, kind, shadow_first):
    state = start(asked(kind=kind, shadow_first=shadow_first), 1.0).state
    world = World(state)
    for now_s, event in zip(itertools.count(2.0), events):
        if isinstance(event, Action):
            moved = advance(state, judged(state, event, now_s))
        elif event == "recovered":
            moved = advance(state, Recovered(now_s))
        else:
            try:
                moved = advance(state, Operator(Command(event), now_s))
            except ConfigError:
                assert not state.live
                continue
        for instruction in moved.instructions:
            world.do(instruction)
            serving = world.state
            assert serving.live or serving.share == 0
            # While replicas do not follow the rollout, the alias is already right.
            if serving.status is Status.PROMOTED:
                assert world.aliases["champion"] == "4"
            elif not serving.live:
                assert world.aliases["champion"] == "3"
        assert world.state == moved.state
        assert moved.state.step >= state.step
        if kind is Kind.SHADOW and moved.state.live and not moved.state.ending:
            assert moved.state.share == 0
        state = moved.state


def test_audit_lines_are_json_with_time_and_evidence():
    state = start(asked(), 10.0).state
    bad = Finding("AUC fall", float("nan"), float("-inf"), 0.02, 0.0, 7.0, 30, 30)
    verdict = Verdict(Action.ROLL_BACK, "why", state.id, state.step, 1_700_000_000.5, (bad,))
    end = advance(state, Judged(verdict))
    text = encode(lines(end)[0])
    assert text.endswith("\n")
    assert text.count("\n") == 1
    line = json.loads(text)
    assert line["time"] == "2023-11-14T22:13:20.500+00:00"
    assert line["by"] == "guard"
    assert line["evidence"][0]["size"] is None
    assert len({line["id"] for line in lines(end)}) == 2


def test_mirrored_work_is_dropped_over_its_bound_and_never_queued():
    budget = MirrorBudget(max_rows=100, max_queued=10)
    assert budget.admit(60)
    assert not budget.admit(60)  # would be too many at once
    assert not budget.admit(1, queued=11)  # the primary is behind
    assert budget.admit(40, queued=10)
    budget.done(60)
    assert budget.admit(60)
    assert (budget.running, budget.mirrored, budget.dropped) == (100, 160, 61)


def test_the_state_survives_its_tag():
    state = start(
        asked(key=("customer",), segments=("carrier", "origin"), shadow_first=0.1), 12.5
    ).state
    assert RolloutState.from_tag(state.to_tag()) == state
    assert len(state.to_tag()) < 500


def test_a_large_state_still_fits_and_a_larger_one_is_refused():
    edges = tuple(i + 0.123456 for i in range(48))
    state = asked(
        bins=Bins(scale="edges", edges=edges), key=("k" * 50,) * 8, segments=("s" * 50,) * 8
    )
    assert len(state.to_tag()) < LARGEST_TAG
    with pytest.raises(ConfigError, match="a tag holds"):
        asked(key=("k" * 1000,) * 8).to_tag()


@pytest.mark.parametrize(
    ("tag", "names"),
    [
        ("", "no rollout state"),
        ("{}", "id"),
        ('{"id":"r","model":"m","incumbent":"1","challenger":"2","stpes":[1]}', "stpes"),
        ('{"id":"r","model":"m","incumbent":"1","challenger":"2","version":2}', "version"),
    ],
)
def test_a_tag_that_is_no_state_is_refused_with_what_is_wrong(tag, names):
    with pytest.raises(ConfigError, match=names):
        RolloutState.from_tag(tag)


@pytest.mark.parametrize(
    "wrong",
    [
        {"challenger": "3"},
        {"steps": (0.5, 0.25)},
        {"steps": (0.0, 1.0)},
        {"steps": ()},
        {"steps": (0.5, 1.5)},
        {"step": 4},
        {"share": 1.5},
        {"started_s": float("nan")},
        {"thresholds": {"psi": 0}},
        {"thresholds": {"alhpa": 0.1}},
    ],
)
def test_a_state_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError):
        asked(**wrong)


def test_replicas_load_what_the_state_needs_and_no_more():
    state = start(asked(), 10.0).state
    assert state.versions == ("3", "4")
    assert state.but(share=0.0).versions == ("3",)
    assert advance(state, Operator(Command.ABORT, 20.0)).state.versions == ()


def test_thresholds_have_conventional_defaults():
    assert (Thresholds().psi, Thresholds().latency_ratio) == (0.25, 1.5)
