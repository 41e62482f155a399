"""Limits: the windows in memory against the `limits` library's, headers, keys' own, Redis."""

import asyncio
import socket
import threading
import time
from pathlib import Path
from typing import Any

import limits
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter, SlidingWindowCounterRateLimiter
from pydantic import ValidationError

from twinpath.errors import LimitError, QuotaError, RetryLaterError
from twinpath.online.dataplane import Ask
from twinpath.online.gateway import keys as keys_module
from twinpath.online.gateway import limiting, windows
from twinpath.online.gateway.args import GatewayArgs
from twinpath.online.gateway.build import build
from twinpath.online.gateway.keys import new_key, write_keys
from twinpath.online.gateway.limiting import Limit, SharedLimit, address_of
from twinpath.online.gateway.rules import Gateway
from twinpath.online.gateway.windows import FixedWindows, SlidingWindows


def ask(principal: str | None = None, **more: Any) -> Ask:
    seen = Ask("numbers", more.pop("headers", {}), **more)
    seen.principal = principal
    return seen


def gateway(**given: Any) -> Gateway:
    return build(GatewayArgs.model_validate(given), "numbers")


# windows


class Quiet(MemoryStorage):
    """The library's storage in memory, without its threads."""

    def __init__(self) -> None:
        super().__init__()
        self.timer.cancel()
        self._MemoryStorage__schedule_expiry = lambda: None


steps = st.lists(
    st.tuples(st.sampled_from("ab"), st.floats(0, 7, allow_nan=False, width=16)), max_size=60
)


@pytest.mark.parametrize("sliding", [True, False], ids=["sliding", "fixed"])
@settings(max_examples=150, deadline=None)
@given(steps=steps, amount=st.integers(1, 6))
def test_windows_grant_what_the_library_grants(
    sliding: bool, steps: list[tuple[str, float]], amount: int
):
    item = limits.parse(f"{amount}/5 second")
    theirs = (SlidingWindowCounterRateLimiter if sliding else FixedWindowRateLimiter)(Quiet())
    ours = (SlidingWindows if sliding else FixedWindows)(amount, 5)
    now_s = 1_700_000_000.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.time", lambda: now_s)
        for caller, later_s in steps:
            now_s += later_s
            assert (ours.hit(caller, now_s)[0] == 0) == theirs.hit(item, caller), now_s


@pytest.mark.parametrize("kind", [SlidingWindows, FixedWindows])
@given(
    early=st.integers(0, 12),
    late=st.integers(0, 12),
    at_s=st.floats(10, 19.9),
    amount=st.integers(1, 9),
)
def test_who_waits_as_long_as_told_is_let_in_and_not_much_sooner(
    kind: Any, early: int, late: int, at_s: float, amount: int
):
    counts, start_s = kind(amount, 10), 1_700_000_000.0
    now_s = start_s + at_s
    for hit_s in [start_s + 9] * early + [now_s] * late:
        counts.hit("ann", hit_s)
    wait_s, _, _ = counts.hit("ann", now_s)
    if wait_s:
        if wait_s > 0.01:  # shorter ones are rounded up
            assert counts.hit("ann", now_s + wait_s * 0.9)[0] > 0
        assert counts.hit("ann", now_s + wait_s + 0.01)[0] == 0


@pytest.mark.parametrize("kind", [SlidingWindows, FixedWindows])
def test_a_standing_counts_down_and_begins_anew(kind: Any):
    counts, now_s = kind(3, 10), 1_700_000_000.0
    for left in (2, 1, 0):
        assert counts.hit("ann", now_s) == (0, left, 10.0)
    assert counts.hit("ann", now_s) == (10.0, 0, 10.0)
    assert counts.hit("ann", now_s + 25)[:2] == (0, 2)


@pytest.mark.parametrize("kind", [SlidingWindows, FixedWindows])
def test_callers_are_forgotten_before_memory_is_full(kind: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(windows, "BOUND", 100)
    counts, now_s = kind(1, 10), 1_700_000_000.0
    for number in range(1000):
        assert counts.hit(f"caller {number}", now_s)[0] == 0
    assert len(counts._counts) <= 100
    assert counts.hit("caller 999", now_s)[0] > 0, "the latest are remembered"
    counts.hit("later", now_s + 30)
    assert len(counts._counts) <= 100


def test_limits_in_memory_start_no_thread():
    before = threading.active_count()
    rule = Limit("100/second")
    for number in range(50):
        rule.admit(ask(f"p{number}"))
    assert threading.active_count() == before


# who is counted


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("ipv4:10.0.0.1:4711", "10.0.0.1"),
        ("ipv6:%5B2001:db8::7%5D:4711", "2001:db8::/64"),
        ("2001:db8::9", "2001:db8::/64"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("fe80::1%eth0", "fe80::/64"),
        ("unix:/tmp/socket", "unix:/tmp/socket"),
        ("", ""),
    ],
)
def test_a_caller_is_an_address_whatever_its_port(peer: str, address: str):
    assert address_of(peer) == address


@given(st.text(max_size=60))
def test_no_peer_breaks_a_limit(peer: str):
    Limit("1000000/second").admit(ask(peer=peer))


def test_a_new_connection_is_no_new_caller():
    rule = Limit("1/minute")
    rule.admit(ask(peer="ipv4:10.0.0.1:1", transport="grpc"))
    with pytest.raises(LimitError):
        rule.admit(ask(peer="ipv4:10.0.0.1:2", transport="grpc"))
    rule.admit(ask(peer="ipv4:10.0.0.2:1", transport="grpc"))


@pytest.mark.parametrize("text", ["0/second", "0 per day"])
def test_a_limit_that_grants_nothing_is_refused(text: str):
    with pytest.raises(ValidationError, match="grants nothing"):
        GatewayArgs.model_validate({"limits": {"quota": text}})


# headers


def told(gate: Gateway, seen: Ask) -> dict[str, int]:
    """The letters of the draft: q and w of the policy, r and t of where the caller stands."""
    fields = b";".join(value for _, value in gate.headers(seen)).decode().split(";")
    return {field[0]: int(field[2:]) for field in fields if "=" in field}


def test_answers_tell_the_limit_that_is_nearest():
    gate, seen = gateway(limits={"rate": "10/minute", "quota": "3/day"}), ask("ann")
    assert gate.headers(seen) == [], "nobody has counted anything yet"
    gate.admit(seen)
    found = told(gate, seen)
    assert (found["q"], found["w"], found["r"]) == (3, 86_400, 2)
    assert 86_000 < found["t"] <= 86_400
    gate.admit(ask("ann"))
    gate.admit(ask("ann"))
    last = ask("ann")
    with pytest.raises(QuotaError):
        gate.admit(last)
    assert told(gate, last)["r"] == 0


def test_a_refusal_tells_the_limit_that_refused():
    gate = gateway(limits={"rate": "2/hour", "quota": "2/day"})
    gate.admit(ask("ann"))
    gate.admit(ask("ann"))
    last = ask("ann")
    with pytest.raises(LimitError):
        gate.admit(last)
    assert told(gate, last)["w"] == 3600
    gate = gateway(limits={"rate": "3/hour", "quota": "2/day"})
    gate.admit(ask("ann"))
    gate.admit(ask("ann"))
    last = ask("ann")
    with pytest.raises(QuotaError):
        gate.admit(last)
    assert (told(gate, last)["w"], told(gate, last)["r"]) == (86_400, 0)


def test_limits_are_not_told_where_that_is_not_wanted():
    gate, seen = gateway(limits={"rate": "10/minute", "headers": False}), ask("ann")
    gate.admit(seen)
    assert gate.headers(seen) == []
    assert gateway().headers(ask("ann")) == []


# a key's own limits


def asked_with(key: str) -> Ask:
    return ask(headers={b"x-api-key": key.encode()})


def test_a_key_has_limits_of_its_own(tmp_path: Path):
    (tight, first), (same, second), (free, third) = (
        new_key("ann", rate="2/minute"),
        new_key("ann", rate="2/minute", quota="9/day"),
        new_key("ben"),
    )
    write_keys(tmp_path / "keys", [first, second, third])
    gate = gateway(api_keys=str(tmp_path / "keys"))
    gate.admit(asked_with(tight))
    gate.admit(asked_with(same))
    for key in (tight, same):
        with pytest.raises(LimitError, match="2/minute"):
            gate.admit(asked_with(key))
    for _ in range(5):
        gate.admit(asked_with(free))


def test_a_change_of_the_file_does_not_give_a_quota_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(keys_module, "CHECK_S", -1.0)
    (key, record), (_, other) = new_key("ann", quota="1/day"), new_key("ben")
    write_keys(tmp_path / "keys", [record])
    gate = gateway(api_keys=str(tmp_path / "keys"))
    gate.admit(asked_with(key))
    write_keys(tmp_path / "keys", [record, other])
    with pytest.raises(QuotaError):
        gate.admit(asked_with(key))
    write_keys(tmp_path / "keys", [record.model_copy(update={"quota": "5/day"}), other])
    gate.admit(asked_with(key))


@pytest.mark.parametrize("text", ["often", "0/day"])
def test_a_keys_limit_has_to_be_readable(text: str):
    with pytest.raises(ValidationError):
        new_key("ann", rate=text)


# in Redis


async def admit(gate: Gateway, seen: Ask) -> None:
    pending = gate.admit(seen)
    if pending is not None:
        await pending


async def test_a_quota_is_shared_and_told_by_every_replica(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(limiting, "_STANDING_S", 0.0)
    given = {"limits": {"rate": "9/day", "quota": "4/day", "redis_url": redis_url}}
    one, two = gateway(**given), gateway(**given)
    for remaining, gate in zip((3, 2, 1, 0), (one, two, one, two), strict=True):
        seen = ask("ann")
        await admit(gate, seen)
        assert told(gate, seen)["r"] == remaining
    for gate in (one, two):
        with pytest.raises(QuotaError, match="4/day"):
            await admit(gate, ask("ann"))


async def test_limits_of_the_same_text_do_not_count_each_others_requests(
    redis_url: str, tmp_path: Path
):
    key, record = new_key("ann", rate="3/day")
    write_keys(tmp_path / "keys", [record])
    gate = gateway(
        api_keys=str(tmp_path / "keys"),
        limits={"rate": "3/day", "quota": "3/day", "redis_url": redis_url},
    )
    for _ in range(3):
        await admit(gate, asked_with(key))
    with pytest.raises(LimitError):
        await admit(gate, asked_with(key))


async def test_many_at_once_get_no_more_than_the_limit(redis_url: str):
    gates = [gateway(limits={"rate": "20/day", "redis_url": redis_url}) for _ in range(2)]
    results = await asyncio.gather(
        *(admit(gates[number % 2], ask("ann")) for number in range(60)), return_exceptions=True
    )
    assert sum(result is None for result in results) == 20
    assert {type(result) for result in results} == {type(None), LimitError}


@pytest.mark.parametrize("hangs", [True, False], ids=["hangs", "is not there"])
async def test_without_redis_requests_are_refused_soon(
    hangs: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(limiting, "REDIS_S", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        if hangs:
            silent.listen()
        rule = SharedLimit("9/day", f"redis://127.0.0.1:{silent.getsockname()[1]}", "numbers")
        for longest_s in (1.0, 0.05):
            started_s = time.monotonic()
            with pytest.raises(RetryLaterError, match="cannot be counted") as refused:
                await rule.admit(ask("ann"))
            assert refused.value.http_status == 503
            assert time.monotonic() - started_s < longest_s, "only the first one waits"
    assert "cannot be counted in Redis" in caplog.text
