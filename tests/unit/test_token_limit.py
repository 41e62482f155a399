"""Limits on tokens: a sliding window, charged afterwards."""

import pytest

from twinpath.errors import LimitError
from twinpath.online.dataplane import Ask
from twinpath.online.gateway.spending import TokenLimit


def test_a_caller_is_let_in_while_anything_is_left():
    limit = TokenLimit("100/minute")
    limit.charge("ann", 99, 0.0)
    assert limit.wait_s("ann", 1.0) == 0
    limit.charge("ann", 500, 1.0)
    assert limit.wait_s("ann", 2.0) > 0
    assert limit.wait_s("bob", 2.0) == 0


@pytest.mark.parametrize("tokens", [100, 150, 400, 10_000])
def test_the_wait_is_as_long_as_it_takes(tokens: int):
    limit = TokenLimit("100/minute")
    limit.charge("ann", tokens, 10.0)
    wait_s = limit.wait_s("ann", 20.0)
    assert limit.wait_s("ann", 20.0 + wait_s - 0.1) > 0
    assert limit.wait_s("ann", 20.0 + wait_s + 0.1) == 0


def test_the_wait_within_a_window_counts_what_the_one_before_weighs():
    limit = TokenLimit("100/minute")
    limit.charge("ann", 200, 59.0)
    limit.charge("ann", 50, 61.0)
    wait_s = limit.wait_s("ann", 62.0)
    assert 0 < wait_s < 60
    assert limit.wait_s("ann", 62.0 + wait_s - 0.1) > 0
    assert limit.wait_s("ann", 62.0 + wait_s + 0.1) == 0


def test_what_is_long_gone_is_forgotten():
    limit = TokenLimit("100/minute")
    limit.charge("ann", 10_000, 0.0)
    assert limit.wait_s("ann", 180.0) == 0


def test_each_replica_grants_its_part():
    limit = TokenLimit("100/minute", replicas=4)
    limit.charge("ann", 25, 0.0)
    assert limit.wait_s("ann", 1.0) > 0


def test_a_request_is_counted_for_its_principal():
    limit = TokenLimit("10/day")
    ann, bob = (Ask(graph="g", headers={}, principal=name) for name in ("ann", "bob"))
    limit.spent(ann, 10)
    limit.spent(bob, 0)
    with pytest.raises(LimitError, match="10/day tokens is used up") as raised:
        limit.admit(ann)
    assert raised.value.retry_after_s >= 1
    limit.admit(bob)
