"""The batching policy as a story: events in, instructions out, and the clock is ours."""

import pytest

from twinpath.graph.placement import Batch
from twinpath.online.policy import BatchPolicy, Dispatch, Priority, WakeAt


def policy(max_size: int = 4, max_wait_ms: float = 0.0, max_inflight: int = 1) -> BatchPolicy:
    return BatchPolicy(Batch(max_size=max_size, max_wait_ms=max_wait_ms), max_inflight)


def test_a_request_leaves_at_once_and_those_behind_it_grow_into_one_batch():
    story = policy()
    assert story.decide(0.0) is None, "nothing came yet"
    story.arrived(1, 1, 0.0)
    assert story.decide(0.0) == Dispatch((1,)), "a slot is free: no latency tax"
    story.arrived(2, 1, 0.1)
    story.arrived(3, 2, 0.2)
    assert story.decide(0.2) is None, "the slot is taken"
    assert story.queued_rows == 3
    story.finished()
    assert story.decide(0.3) == Dispatch((2, 3)), "what came meanwhile travels together"
    assert story.queued_rows == 0
    story.finished()
    assert story.decide(0.4) is None
    assert story.running == 0


def test_a_batch_stops_at_its_size_and_requests_keep_their_order():
    story = policy(max_size=4)
    for ticket, rows in enumerate((2, 1, 2, 1)):
        story.arrived(ticket, rows, 0.0)
    assert story.decide(0.0) == Dispatch((0, 1)), "2 would make five rows; 3 does not overtake it"
    story.finished()
    assert story.decide(0.0) == Dispatch((2, 3))


def test_a_request_larger_than_a_batch_is_not_split_and_goes_alone():
    story = policy(max_size=4)
    story.arrived(1, 9, 0.0)
    story.arrived(2, 1, 0.0)
    assert story.decide(0.0) == Dispatch((1,))
    story.finished()
    assert story.decide(0.0) == Dispatch((2,))


def test_as_many_batches_run_as_there_are_slots():
    story = policy(max_size=1, max_inflight=2)
    for ticket in range(3):
        story.arrived(ticket, 1, 0.0)
    assert story.decide(0.0) == Dispatch((0,))
    assert story.decide(0.0) == Dispatch((1,))
    assert story.decide(0.0) is None
    story.finished()
    assert story.decide(0.0) == Dispatch((2,))


def test_a_batch_that_is_not_full_is_held_when_that_was_asked_for():
    story = policy(max_size=2, max_wait_ms=10)
    story.arrived(1, 1, 5.0)
    assert story.decide(5.0) == WakeAt(pytest.approx(5.01))
    story.arrived(2, 1, 5.004)
    assert story.decide(5.004) == Dispatch((1, 2)), "full: held no longer"
    story.finished()
    story.arrived(3, 1, 6.0)
    assert story.decide(6.02) == Dispatch((3,)), "its time is over"


def test_a_batch_that_the_next_request_would_overfill_is_not_held():
    story = policy(max_size=4, max_wait_ms=10)
    story.arrived(1, 3, 0.0)
    story.arrived(2, 3, 0.0)
    assert story.decide(0.0) == Dispatch((1,)), "waiting cannot make it larger"


def test_a_dropped_request_leaves_no_trace_and_dropping_it_again_is_harmless():
    story = policy()
    story.arrived(1, 1, 0.0)
    assert story.decide(0.0) == Dispatch((1,))
    story.arrived(2, 3, 0.0)
    story.arrived(3, 1, 0.0)
    story.dropped(2)
    story.dropped(2)
    assert story.queued_rows == 1
    story.finished()
    assert story.decide(0.0) == Dispatch((3,))


def test_higher_priorities_leave_first_and_each_keeps_its_order():
    story = policy(max_size=3)
    for ticket, priority in enumerate(
        (Priority.LOW, Priority.NORMAL, Priority.HIGH, Priority.NORMAL)
    ):
        story.arrived(ticket, 1, 0.0, priority)
    assert story.decide(0.0) == Dispatch((2, 1, 3))
    story.finished()
    assert story.decide(0.0) == Dispatch((0,))


def test_the_lowest_and_newest_are_shed_first_and_never_ones_equals():
    story = policy()
    story.arrived(1, 2, 0.0, Priority.LOW)
    story.arrived(2, 2, 0.0, Priority.LOW)
    story.arrived(3, 2, 0.0, Priority.NORMAL)
    assert story.shed_for(Priority.LOW, 1) is None
    assert story.shed_for(Priority.NORMAL, 2) == [2]
    assert story.shed_for(Priority.NORMAL, 3) == [2, 1]
    assert story.shed_for(Priority.NORMAL, 5) is None
    assert story.shed_for(Priority.HIGH, 5) == [2, 1, 3]
    assert story.queued_rows == 6, "the policy only names them"


def test_a_request_without_rows_is_answered_too():
    story = policy()
    story.arrived(1, 0, 0.0)
    assert story.decide(0.0) == Dispatch((1,))


def test_a_batch_that_has_not_begun_takes_what_still_fits():
    story = policy(max_size=4)
    story.arrived(1, 1, 0.0)
    assert story.decide(0.0) == Dispatch((1,))
    for ticket, rows in ((2, 2), (3, 1), (4, 1)):
        story.arrived(ticket, rows, 0.0)
    assert story.top_up(1) == (2, 3)
    assert story.top_up(4) == ()
    assert story.queued_rows == 1
    assert story.running == 1
