"""A rollout lives in the registry: whoever dies, and wherever, the next one goes on from there."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shelf import Faulty, filled

from twinpath.errors import InputError, RegistryError, RolloutError, UnknownModelError
from twinpath.online.rollouts.asked import StartRequest
from twinpath.online.rollouts.desk import Changed, Desk
from twinpath.online.rollouts.director import Director
from twinpath.online.rollouts.gates import GATE_TAG, REQUIRE_TAG, Gate
from twinpath.online.rollouts.measures import RolloutMetrics
from twinpath.online.rollouts.operations import Operations
from twinpath.registry.reference import PREVIOUS_TAG
from twinpath.rollout.machine import Command, Judged
from twinpath.rollout.recorder import Recorder
from twinpath.rollout.sketch import Report
from twinpath.rollout.state import REFUSED_TAG, TAG, RolloutState, Status
from twinpath.rollout.verdict import Action, Verdict

ASKED = {
    "challenger": "2", "steps": [0.1, 1.0], "segments": ["carrier"],
    "minimum_samples": 200, "minimum_time_s": 5,
}  # fmt: skip


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def shelf() -> Faulty:
    return filled()


@pytest.fixture
def desk(shelf: Faulty, clock: Clock) -> Desk:
    return Desk(shelf, clock=clock)


def asked(**changes: Any) -> StartRequest:
    return StartRequest.read(ASKED | changes)


def scored(rows: int, share: float, seed: int, shift: float = 0.0, errors: float = 0.0) -> Report:
    """What replicas report of so many rows, of which the challenger had its share."""
    random = np.random.default_rng(seed)
    recorder = Recorder(("carrier",))
    for version, part in (("1", rows - int(rows * share)), ("2", int(rows * share))):
        logits = random.normal(0, 1.5, part) + (shift if version == "2" else 0)
        failed = random.random(part) < (errors if version == "2" else 0)
        carrier = random.choice(["AA", "DL", "UA"], part).astype(object)
        if part:
            recorder.record(version, 1 / (1 + np.exp(-logits)), {"carrier": carrier}, 0.01, failed)
    return recorder.drain()


def run(director: Director, clock: Clock, seconds: int, **how: Any) -> list[str]:
    """Ticks of a second each with reports; the states that were passed through."""
    seen: list[str] = []
    for _ in range(seconds):
        clock.now_s += 1
        state = director.state
        if state is None or state.live:
            share = state.share if state is not None else 0.1
            director.report(scored(400, share, seed=int(clock.now_s), **how))
        after = director.tick()
        name = "none" if after is None else f"{after.status}:{after.step}:{after.share:g}"
        if not seen or seen[-1] != name:
            seen.append(name)
    return seen


def test_a_good_challenger_is_promoted_step_by_step(shelf: Faulty, desk: Desk, clock: Clock):
    desk.start("delay", asked(), by="ann")
    director = Director(desk, "delay", clock)
    seen = run(director, clock, 40)
    assert seen == ["running:0:0.1", "running:1:1", "promoted:1:0"]
    assert shelf.aliases == {"champion": "2"}
    assert shelf.tags[PREVIOUS_TAG] == "1"
    events = [line["event"] for line in desk.history("delay")]
    assert events == ["started", "stepped", "promote: decided", "promoted"]
    assert desk.history("delay")[0]["by"] == "ann"
    assert desk.history("delay")[1]["evidence"], "the figures that it was decided on"
    assert [name.split(":")[1] for name in shelf.files] == ["4"], "and filed as a whole"


def test_one_whose_rows_fail_is_rolled_back_with_the_evidence(
    shelf: Faulty, desk: Desk, clock: Clock
):
    desk.start("delay", asked())
    seen = run(Director(desk, "delay", clock), clock, 40, errors=0.2)
    assert seen[-1] == "rolled_back:0:0"
    assert shelf.aliases == {"champion": "1"}
    assert "error" in shelf.version_tags["2"][REFUSED_TAG]
    with pytest.raises(RolloutError, match="was refused"):
        desk.start("delay", asked())
    assert desk.start("delay", asked(again=True)).live


def test_one_that_a_replica_refused_is_rolled_back_by_that_reason(
    shelf: Faulty, desk: Desk, clock: Clock
):
    desk.start("delay", asked())
    director = Director(desk, "delay", clock)
    director.tick()
    shelf.version_tags["2"][REFUSED_TAG] = "signature: it reads a column that is not there"
    after = director.tick()
    assert after is not None
    assert after.status is Status.ROLLED_BACK
    assert "column that is not there" in after.reason


def test_a_registry_that_is_away_stops_the_rollout_and_nothing_else(
    shelf: Faulty, desk: Desk, clock: Clock
):
    desk.start("delay", asked())
    director = Director(desk, "delay", clock)
    run(director, clock, 3)
    shelf.away = True
    assert set(run(director, clock, 60)) == {"running:0:0.1"}
    assert not director.status()["registry"]["reachable"]
    shelf.away = False
    assert run(director, clock, 40)[-1] == "promoted:1:0"
    assert director.status()["registry"]["reachable"]


def test_another_director_goes_on_at_the_same_step(shelf: Faulty, desk: Desk, clock: Clock):
    desk.start("delay", asked(steps=[0.1, 0.5, 1.0]))
    first = Director(desk, "delay", clock)
    for _ in range(40):
        run(first, clock, 1)
        if first.state is not None and first.state.step == 1:
            break
    state = first.state
    assert state is not None
    second = Director(desk, "delay", clock)
    after = second.tick()
    assert after is not None
    assert (after.step, after.status, after.started_s) == (1, Status.RUNNING, state.started_s)
    assert run(second, clock, 60)[-1] == "promoted:2:0"


@pytest.mark.parametrize("action", [Action.PROMOTE, Action.ROLL_BACK])
def test_whatever_write_fails_the_end_is_the_same(action: Action, clock: Clock):
    """The director dies at each write in turn; another one brings the rollout to its end."""
    ends, writes = set(), 1
    for fail_at in range(20):
        shelf = filled()
        desk = Desk(shelf, clock=clock)
        state = desk.start("delay", asked(steps=[1.0]))
        shelf.fail_in = fail_at
        verdict = Verdict(action, "as it is", state.id, 0, clock.now_s)
        found, _ = desk.read("delay")
        try:
            desk.advance("delay", found, state, Judged(verdict))
        except RegistryError:
            writes += 1
        shelf.fail_in, shelf.away = None, False
        director = Director(desk, "delay", clock)
        after = director.tick()
        assert after is not None
        if after.live:  # it died before the decision was saved: decided again
            found, state = desk.read("delay")
            assert state is not None
            after = desk.advance("delay", found, state, Judged(verdict))
        refused = REFUSED_TAG in shelf.version_tags["2"]
        ends.add((after.status, after.share, shelf.aliases["champion"], refused))
        stored = RolloutState.from_tag(shelf.tags[TAG])
        assert (stored.status, stored.ending) == (after.status, None)
        events = [line["event"] for line in desk.history("delay")]
        assert len(events) == len(set(events)), "no line is there twice"
    assert writes >= 5, "writes were cut off"
    assert len(ends) == 1


def test_a_decision_on_a_state_that_was_changed_meanwhile_is_dropped(
    shelf: Faulty, desk: Desk, clock: Clock
):
    state = desk.start("delay", asked())
    found, _ = desk.read("delay")
    desk.command("delay", Command.ABORT, by="ann")
    verdict = Verdict(Action.PROMOTE, "", state.id, 0, clock.now_s)
    with pytest.raises(Changed):
        desk.advance("delay", found, state, Judged(verdict))
    assert RolloutState.from_tag(shelf.tags[TAG]).status is Status.ABORTED


def test_an_operator_pauses_resumes_and_ends(shelf: Faulty, desk: Desk, clock: Clock):
    operate = Operations(desk)
    with pytest.raises(RolloutError, match="has had no rollout"):
        operate.run("pause", {"model": "delay"})
    started = operate.run("start", {"model": "delay", "by": "ann", "rollout": ASKED})
    assert started["rollout"]["live"]
    with pytest.raises(RolloutError, match="under way"):
        operate.run("start", {"model": "delay", "rollout": ASKED})
    operate.run("pause", {"model": "delay", "by": "ann"})
    director = Director(desk, "delay", clock)
    assert set(run(director, clock, 30)) == {"paused:0:0.1"}
    operate.run("resume", {"model": "delay", "by": "ann"})
    operate.run("promote", {"model": "delay", "by": "ann", "reason": "we are sure"})
    assert shelf.aliases == {"champion": "2"}
    with pytest.raises(RolloutError, match="is over"):
        operate.run("abort", {"model": "delay"})
    lines = operate.run("history", {"model": "delay"})["history"]
    assert {line["by"] for line in lines if line["event"] != "promoted"} == {"ann"}
    assert "we are sure" in json.dumps(lines)
    status = operate.run("status", {"model": "delay"})
    assert status["rollout"]["status"] == "promoted"
    assert [v["version"] for v in status["versions"]] == ["1", "2", "3"]
    with pytest.raises(InputError, match="Did you mean 'status'"):
        operate.run("statu", {"model": "delay"})


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"challenger": "1"}, RolloutError, "serves already"),
        ({"challenger": "9"}, UnknownModelError, "'9'"),
        ({"challenger": "new"}, InputError, "challenger"),
        ({"alias": "rc"}, RolloutError, "no alias 'rc'"),
        ({"steps": [0.5, 0.1]}, InputError, "growing shares"),
        ({"stepz": [0.5]}, InputError, "Did you mean 'steps'"),
    ],
)
def test_what_cannot_be_started_is_refused_by_name(
    desk: Desk, changes: dict[str, Any], error: type[Exception], says: str
):
    with pytest.raises(error, match=says):
        desk.start("delay", asked(**changes))


def gate(kind: str, **changes: Any) -> Gate:
    fields = {"passed": True, "incumbent": "1", "time_s": 1.0, "reason": "", "figures": {}}
    return Gate(kind, **(fields | changes))


@pytest.mark.parametrize("where", ["config", "tag"])
def test_without_the_reports_that_are_asked_for_no_rollout_starts(
    shelf: Faulty, clock: Clock, where: str
):
    needed = ("backtest", "loadtest")
    if where == "tag":
        shelf.tags[REQUIRE_TAG] = json.dumps(needed)
    desk = Desk(shelf, require=needed if where == "config" else (), clock=clock)

    def refused(says: str) -> None:
        with pytest.raises(RolloutError, match=says):
            desk.start("delay", asked())
        assert TAG not in shelf.tags

    refused("no backtest.*`twinpath rollout backtest MODULE:GRAPH --model delay --challenger 2")
    desk.keep_gate("delay", "2", gate("backtest"), [])
    refused("no loadtest.*twinpath rollout loadtest")
    desk.keep_gate("delay", "2", gate("loadtest", passed=False, reason="p99 is 9 s"), [])
    refused("did not pass its loadtest: p99 is 9 s")
    desk.keep_gate("delay", "2", gate("loadtest", incumbent="3"), [])
    refused("against version 3")
    desk.keep_gate("delay", "2", gate("loadtest"), [])
    assert desk.start("delay", asked()).live
    assert set(shelf.version_tags["2"]) >= {GATE_TAG + "backtest", GATE_TAG + "loadtest"}


def test_lines_go_to_the_file_too_and_once(shelf: Faulty, clock: Clock, tmp_path: Path):
    desk = Desk(shelf, audit_log=tmp_path / "logs" / "rollouts.jsonl", clock=clock)
    desk.start("delay", asked())
    desk.command("delay", Command.ABORT, reason="enough")
    lines = (tmp_path / "logs" / "rollouts.jsonl").read_text().splitlines()
    events = [json.loads(line)["event"] for line in lines]
    assert events == ["started", "abort: decided", "aborted"]


def test_labels_come_to_the_guard_by_version(desk: Desk, clock: Clock):
    desk.start("delay", asked(thresholds={"accuracy": 0.1}))
    director = Director(desk, "delay", clock)
    run(director, clock, 2)
    random = np.random.default_rng(0)
    for _ in range(20):
        for version, right in (("1", 0.9), ("2", 0.5)):
            labels = (random.random(100) < 0.5).astype(float)
            correct = random.random(100) < right
            scores = np.where(correct, labels, 1 - labels) * 0.8 + 0.1
            director.label([version] * 100, scores.tolist(), labels.tolist())
        director.label(["2"], [0.3], [7.0])  # neither 0 nor 1: left out
        clock.now_s += 1
        after = director.tick()
    assert after is not None
    assert after.status is Status.ROLLED_BACK
    assert any(word in after.reason for word in ("accuracy", "AUC", "auc", "calibration")), (
        after.reason
    )


def test_metrics_say_where_a_rollout_is_and_fall_to_nothing_after_it(desk: Desk, clock: Clock):
    values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}

    def make(kind: str, name: str, text: str, labels: tuple[str, ...]) -> Any:
        class Gauge:
            def set(self, value: float, tags: dict[str, str]) -> None:
                assert set(tags) == set(labels)
                values[name, tuple(sorted(tags.items()))] = value

        assert (kind, bool(text)) == ("Gauge", True)
        return Gauge()

    def value(name: str, **labels: str) -> float:
        tags = {"model": "delay"} | labels
        return values[f"twinpath_{name}", tuple(sorted(tags.items()))]

    metrics = RolloutMetrics(make)
    desk.start("delay", asked())
    director = Director(desk, "delay", clock)
    run(director, clock, 3)
    replica = {"versions": [{"version": "2", "state": "refused"}, {"version": "1", "state": "x"}]}
    metrics.tell("delay", director, [replica, replica])
    assert (value("rollout_live"), value("rollout_step")) == (1, 0)
    shares = value("rollout_share", version="1"), value("rollout_share", version="2")
    assert shares == (0.9, 0.1)
    assert value("version_replicas", version="2", state="refused") == 2
    assert value("rollout_samples") > 0
    desk.command("delay", Command.ABORT)
    director.tick()
    metrics.tell("delay", director, [])
    assert (value("rollout_live"), value("rollout_share", version="2")) == (0, 0)
    assert value("version_replicas", version="2", state="refused") == 0
