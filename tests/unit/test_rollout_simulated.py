"""Whole rollouts: the split, the recorder, the guard and the machine on simulated flights."""

from benchmarks.rollout_traffic import (
    Fault,
    better,
    incumbent,
    rollout,
    shifted,
    wrong_for_one,
)
from twinpath.rollout.state import Status


def test_a_canary_wrong_for_one_carrier_is_stopped_by_its_segment_where_all_scores_pass():
    by_segment = rollout(wrong_for_one, seed=1)
    assert by_segment.rolled_back
    assert "carrier=C00" in by_segment.state.reason
    assert by_segment.state.step == 0
    overall_alone = rollout(wrong_for_one, seed=1, segments=())
    assert overall_alone.state.status is Status.PROMOTED


def test_a_good_challenger_is_promoted_through_every_step():
    run = rollout(better, Fault(labels=True), seed=2)
    assert run.state.status is Status.PROMOTED
    assert run.seconds >= 240


def test_scores_that_shifted_are_rolled_back_at_the_first_step():
    run = rollout(shifted, seed=3)
    assert (run.rolled_back, run.state.step) == (True, 0)


def test_equal_models_are_promoted():
    """Two hundred of them are in the benchmark; its result is committed."""
    for seed in range(10, 13):
        assert rollout(incumbent, seed=seed, tick_s=4).state.status is Status.PROMOTED
