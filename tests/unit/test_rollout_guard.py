"""The guard's stories: what it lets pass, what it stops, and how soon."""

import numpy as np
import pytest

from twinpath.errors import InputError
from twinpath.rollout.bins import Bins, Scale
from twinpath.rollout.checks import SEGMENT_VALUES
from twinpath.rollout.guard import Guard, Labelled, Moved, Observed, Tick
from twinpath.rollout.labels import LabelSketch
from twinpath.rollout.machine import Judged, advance, start
from twinpath.rollout.recorder import Recorder
from twinpath.rollout.sketch import Report
from twinpath.rollout.state import Kind, RolloutState, Status, Thresholds
from twinpath.rollout.verdict import Action, Finding


def begun(**changes):
    asked = RolloutState(
        id="r", model="m", incumbent="1", challenger="2", minimum_samples=100, minimum_time_s=30
    )
    return start(asked.but(**changes), now_s=0.0).state


class Story:
    """A guard with random traffic for both versions; one call of `second` is one report."""

    def __init__(self, **changes):
        self.state = begun(**changes)
        self.guard = Guard(self.state)
        self.random = np.random.default_rng(0)
        self.now_s = 0.0
        self.segment = "k"

    def version(self, recorder, name, rows, *, shift=0.0, failing=0.0, time_s=0.002, values=("a",)):
        for _ in range(0, rows, 10):
            scores = self.random.normal(shift, 1, 10)
            times = time_s * self.random.lognormal(0, 0.3)
            columns = {self.segment: self.random.choice(np.array(values, object), 10)}
            failed = self.random.random(10) < failing
            recorder.record(name, 1 / (1 + np.exp(-scores)), columns, times, failed)

    def second(self, before=200, now=20, values=("a",), **challenger):
        recorder = Recorder(self.state.segments, self.state.bins, capacity=200)
        self.version(recorder, "1", before, values=values)
        self.version(recorder, "2", now, values=values, **challenger)
        self.now_s += 1
        return self.guard.handle(Observed(self.now_s, recorder.drain()))

    def seconds(self, count, **given):
        for _ in range(count):
            verdict = self.second(**given)
            if verdict.action is Action.ROLL_BACK:
                break
        return verdict

    def move(self, **changes):
        self.state = self.state.but(**changes)
        return self.guard.handle(Moved(self.now_s, self.state))


def test_it_waits_for_samples_and_time_then_promotes():
    story = Story()
    verdict = story.second()
    assert (verdict.action, verdict.reason) == (Action.HOLD, "waiting for samples: 20 of 100")
    verdict = story.seconds(9)
    assert story.guard.samples == 200
    assert (verdict.action, verdict.reason) == (Action.HOLD, "waiting for time: 10 of 30 s")
    assert story.seconds(20).action is Action.PROMOTE
    assert story.guard.handle(Tick(31.0)).reason == "nothing against it in 600 rows"


def test_without_any_report_time_alone_never_promotes():
    assert Guard(begun()).handle(Tick(1e6)).action is Action.HOLD


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ({"failing": 0.3}, "error rate"),
        ({"time_s": 0.02}, "p99 ratio"),
        ({"shift": 2.0}, "score "),
    ],
)
def test_a_fault_is_rolled_back_with_its_evidence(fault, check):
    verdict = Story().seconds(120, **fault)
    assert verdict.action is Action.ROLL_BACK
    assert verdict.reason.startswith(check)
    assert verdict.findings[0].harmful
    assert verdict.findings[0].log_e >= verdict.findings[0].needed


def test_a_better_model_of_few_errors_is_not_rolled_back_for_being_different():
    story = Story()
    for _ in range(60):
        verdict = story.second(shift=0.15, failing=0.0)
        assert verdict.action is not Action.ROLL_BACK
    assert verdict.action is Action.PROMOTE


def test_a_small_difference_is_certain_in_the_end_and_still_does_not_matter():
    story = Story(minimum_samples=10**9)
    for _ in range(400):
        verdict = story.second(before=200, now=200, shift=0.2)
        assert verdict.action is Action.HOLD
    sizes = [f for f in story.guard.findings() if f.check == "score PSI"]
    assert sizes[0].log_e > sizes[0].needed
    assert sizes[0].size < 0.25


def test_what_looks_bad_and_is_not_certain_makes_it_wait():
    # 40 rows, of which 5 fail: too few to be certain, too many to go on.
    story = Story(minimum_samples=40, minimum_time_s=0)
    recorder = Recorder()
    scores = np.full(40, 0.5)
    recorder.record("1", np.full(40, 0.5), {}, 0.001)
    recorder.record("2", scores, {}, 0.001, np.arange(40) < 5)
    verdict = story.guard.handle(Observed(1.0, recorder.drain()))
    assert verdict.action is Action.HOLD
    assert verdict.reason.startswith("waiting for more evidence: error rate")


@pytest.mark.parametrize("kind", [Kind.SHADOW, Kind.AB])
def test_shadows_and_ab_tests_are_left_to_the_operator_unless_they_fail(kind):
    story = Story(kind=kind, steps=(0.5,))
    verdict = story.seconds(40)
    assert (verdict.action, "an operator decides" in verdict.reason) == (Action.HOLD, True)
    assert story.seconds(200, shift=4.0, now=200).action is Action.ROLL_BACK


def test_a_pause_holds_what_is_good_and_rolls_back_what_is_bad():
    story = Story()
    story.seconds(31)
    verdict = story.move(status=Status.PAUSED)
    assert (verdict.action, verdict.reason) == (Action.HOLD, "paused")
    assert story.seconds(200, failing=0.8).action is Action.ROLL_BACK


def test_a_rollout_that_is_over_or_ending_is_only_held():
    story = Story()
    story.seconds(60, shift=4.0)
    for changes in ({"ending": "roll_back"}, {"ending": None, "status": Status.ROLLED_BACK}):
        verdict = story.move(**changes)
        assert (verdict.action, verdict.reason) == (Action.HOLD, "the rollout is over")


def test_each_step_has_evidence_of_its_own():
    story = Story()
    story.seconds(31)
    story.state = advance(story.state, Judged(story.second())).state
    assert story.state.step == 1
    verdict = story.move()
    assert (story.guard.samples, verdict.reason) == (0, "waiting for samples: 0 of 100")
    # What went well before does not hide what goes wrong now.
    assert story.seconds(60, shift=2.0).action is Action.ROLL_BACK


def last_step(story):
    while story.state.step < 3:
        story.seconds(31)
        verdict = story.guard.handle(Tick(story.now_s + 100))
        story.state = advance(story.state, Judged(verdict)).state
        story.now_s = story.state.step_started_s
        story.move()
    return story


def test_alone_at_the_last_step_errors_are_held_against_what_was_known():
    story = last_step(Story())
    assert story.seconds(40, before=0, now=200).action is Action.PROMOTE
    story = last_step(Story())
    verdict = story.seconds(40, before=0, now=200, failing=0.05)
    assert verdict.action is Action.ROLL_BACK
    assert verdict.reason.startswith("error rate, against earlier")


def test_after_a_crash_at_the_last_step_a_model_that_mostly_fails_is_still_stopped():
    state = begun().but(step=3, share=1.0)
    story = Story()
    story.state, story.guard = state, Guard(state)
    assert story.seconds(40, before=0, now=50, failing=0.2).action is not Action.ROLL_BACK
    story.guard = Guard(state)
    assert story.seconds(40, before=0, now=50, failing=0.9).action is Action.ROLL_BACK


def test_reports_that_came_late_do_not_hide_errors_of_the_last_step():
    story = last_step(Story())
    story.second(before=50, now=50)
    assert story.seconds(60, before=0, now=200, failing=0.05).action is Action.ROLL_BACK


def test_mirrored_calls_are_slow_by_design_and_not_blamed_for_it():
    story = Story(shadow_first=0.5, minimum_samples=10**9)
    assert story.state.step == -1
    assert story.seconds(60, time_s=0.02).action is Action.HOLD


def test_calls_with_most_of_the_rows_are_not_blamed_for_taking_longer():
    story = Story(kind=Kind.AB, steps=(0.9,), minimum_samples=10**9)
    assert story.seconds(60, before=20, now=200, time_s=0.02).action is Action.HOLD


def test_slow_calls_of_both_versions_are_no_fault_of_one():
    story = Story()
    for second in range(60):
        slow = 0.2 if second % 10 == 5 else 0.002
        recorder = Recorder()
        story.version(recorder, "1", 400, time_s=slow)
        story.version(recorder, "2", 100, time_s=slow)
        verdict = story.guard.handle(Observed(float(second), recorder.drain()))
        assert verdict.action is not Action.ROLL_BACK


def test_a_segment_is_judged_apart_and_named():
    story = Story(segments=("k",), minimum_samples=10**9)
    names = [f"v{i}" for i in range(20)]
    for _ in range(200):
        recorder = Recorder(("k",))
        story.version(recorder, "1", 400, values=names)
        story.version(recorder, "2", 100, values=names[1:])
        story.version(recorder, "2", 10, values=names[:1], shift=3.0)
        verdict = story.guard.handle(Observed(1.0, recorder.drain()))
        if verdict.action is Action.ROLL_BACK:
            break
    assert verdict.action is Action.ROLL_BACK
    assert verdict.findings[0].segment == "k=v0"
    assert {f.segment for f in story.guard.findings() if f.harmful} == {"k=v0"}


def test_failures_within_one_segment_count_there():
    story = Story(segments=("k",), thresholds=Thresholds(error_rate=0.5))
    for _ in range(100):
        recorder = Recorder(("k",))
        story.version(recorder, "1", 400, values=("a", "b"))
        story.version(recorder, "2", 200, values=("a",))
        story.version(recorder, "2", 10, values=("b",), failing=0.5)
        verdict = story.guard.handle(Observed(1.0, recorder.drain()))
        if verdict.action is Action.ROLL_BACK:
            break
    assert any(f.segment == "k=b" and f.harmful for f in story.guard.findings())


def test_the_number_of_segments_it_keeps_is_bounded():
    story = Story(segments=("k",))
    for start_ in range(0, 400, 100):
        values = [str(i) for i in range(start_, start_ + 100)]
        story.second(before=2000, now=2000, values=values)
    segments = {f.segment for f in story.guard.findings() if f.segment}
    assert len(segments) == SEGMENT_VALUES + 1
    assert "k=(other)" in segments
    everything = [f for f in story.guard.findings() if f.check == "score PSI"]
    overall = next(f for f in everything if not f.segment)
    assert overall.challenger_count == sum(f.challenger_count for f in everything if f.segment)


def test_a_report_with_other_bins_is_refused():
    with pytest.raises(InputError, match="does not add"):
        Guard(begun()).handle(Observed(1.0, Report(Bins(scale=Scale.REAL))))


def test_rows_of_a_third_version_do_not_count():
    story = Story()
    recorder = Recorder()
    story.version(recorder, "7", 500)
    assert story.guard.handle(Observed(1.0, recorder.drain())).reason.endswith("0 of 100")


def labels(random, n, *, noise=0.5, bias=0.0, base=0.0):
    logits = random.normal(base, 1.5, n)
    outcome = random.random(n) < 1 / (1 + np.exp(-logits))
    scores = 1 / (1 + np.exp(-(logits + bias + random.normal(0, noise, n))))
    return LabelSketch.of(Bins(), scores, outcome)


@pytest.mark.parametrize(
    ("fault", "check", "thresholds"),
    [
        ({"noise": 6.0}, {"AUC fall", "accuracy fall", "calibration error rise"}, {}),
        ({"bias": 2.0}, {"calibration error rise", "accuracy fall"}, {}),
        ({"base": -1.5}, {"KPI fall"}, {"kpi": 0.05}),
    ],
)
def test_delayed_labels_roll_back_what_scores_alone_may_not_show(fault, check, thresholds):
    random = np.random.default_rng(0)
    state = begun(thresholds=Thresholds(**thresholds))
    guard = Guard(state)
    for second in range(300):
        given = {"1": labels(random, 60), "2": labels(random, 30, **fault)}
        verdict = guard.handle(Labelled(float(second), given))
        if verdict.action is Action.ROLL_BACK:
            break
    assert verdict.action is Action.ROLL_BACK
    assert verdict.findings[0].check in check


def test_better_labels_are_no_reason_to_roll_back():
    random = np.random.default_rng(1)
    guard = Guard(begun())
    for second in range(300):
        given = {"1": labels(random, 60, noise=1.5), "2": labels(random, 30, noise=0.2)}
        verdict = guard.handle(Labelled(float(second), given))
        assert verdict.action is Action.HOLD


def test_labels_of_one_version_only_compare_nothing():
    guard = Guard(begun())
    guard.handle(Labelled(1.0, {"2": labels(np.random.default_rng(0), 100)}))
    assert guard.findings() == []


def test_the_same_events_give_the_same_verdicts():
    def told():
        story = Story(segments=("k",))
        return [story.second(values=("a", "b"), shift=0.5).as_dict() for _ in range(40)]

    assert told() == told()


def test_a_finding_reads_as_a_sentence_with_all_figures():
    finding = Finding("score PSI", 0.412, 0.301, 0.25, 22.94, 11.8, 287, 18, "carrier=UA")
    assert str(finding) == (
        "score PSI where carrier=UA: 0.412 (at least 0.301), threshold 0.25, evidence 22.9 of "
        "11.8 nats, 18 against 287"
    )
