"""Limits on tokens: a sliding window, charged afterwards."""

import asyncio

import pytest

from twinpath.errors import LimitError, RetryLaterError
from twinpath.online.dataplane import Ask
from twinpath.online.gateway.args import GatewayArgs
from twinpath.online.gateway.build import build
from twinpath.online.gateway.spending import SharedTokenLimit, TokenLimit
from twinpath.online.session import free_ports


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


# of several replicas


def asked(name: str) -> Ask:
    return Ask(graph="g", headers={}, principal=name)


def gates(**given):
    """The gateways of two replicas."""
    args = GatewayArgs.model_validate({"limits": given})
    return build(args, "g"), build(args, "g")


def refused(gate, name: str = "ann") -> bool:
    try:
        gate.admit(asked(name))
    except LimitError:
        return True
    return False


def test_two_replicas_in_memory_give_a_caller_its_limit_together_and_one_alone_gives_half():
    one, two = gates(tokens="1000/day", replicas=2)
    one.spent(asked("ann"), 500)
    assert refused(one), "its part is used up"
    assert not refused(two)
    two.spent(asked("ann"), 499)
    assert not refused(two), "something is left"
    two.spent(asked("ann"), 1)
    assert refused(two)
    assert not refused(one, "bob")


async def charged(gate) -> None:
    """Wait until Redis knows what requests have cost."""
    for rule in gate.rules:
        if isinstance(rule, SharedTokenLimit):
            await asyncio.gather(*rule._charging)


async def test_replicas_that_share_a_redis_count_a_callers_tokens_together(redis_url: str):
    one, two = gates(tokens="1000/day", redis_url=redis_url, replicas=2)
    for gate, tokens in ((one, 700), (two, 299)):
        await gate.admit(asked("ann"))
        gate.spent(asked("ann"), tokens)
        await charged(gate)
    for gate in (one, two):
        await gate.admit(asked("ann"))
    one.spent(asked("ann"), 1)
    await charged(one)
    for gate in (one, two):
        with pytest.raises(LimitError, match="1000/day tokens is used up") as raised:
            await gate.admit(asked("ann"))
        assert raised.value.retry_after_s >= 1
        await gate.admit(asked("bob"))


async def test_what_is_spent_while_redis_is_away_is_charged_afterwards(redis_url: str):
    [away] = free_ports(1)
    limit = SharedTokenLimit("10/day", f"redis://127.0.0.1:{away}", "g")
    with pytest.raises(RetryLaterError, match="cannot be counted now"):
        await limit.admit(asked("ann"))
    limit.spent(asked("ann"), 6)
    await asyncio.gather(*limit._charging)
    there = SharedTokenLimit("10/day", redis_url, "g")
    limit._storage, limit._down_until_s = there._storage, 0.0
    limit.spent(asked("ann"), 4)
    await asyncio.gather(*limit._charging)
    with pytest.raises(LimitError):
        await there.admit(asked("ann"))
