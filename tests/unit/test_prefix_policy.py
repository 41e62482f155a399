"""Which replica a prompt goes to, told as stories."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinpath.online.prefix_policy import PrefixPolicy

SHOP = "You answer for a shop that sells shoes. Be short and be kind. " * 3
BANK = "You answer for a bank. Never promise anything to anybody here. " * 3
TWO = ("a", "b")


def policy(**settings) -> PrefixPolicy[str]:
    return PrefixPolicy(**({"block_chars": 32, "slack": 2} | settings))


def test_prompts_that_begin_alike_go_to_one_replica_and_others_to_another():
    router = policy()
    first = router.choose("1", SHOP + "Where is my order?", TWO)
    router.ended("1")
    other = router.choose("2", BANK + "What do I owe?", TWO)
    router.ended("2")
    assert first != other
    for number in range(10):
        assert router.choose(f"s{number}", SHOP + f"question {number}", TWO) == first
        router.ended(f"s{number}")
        assert router.choose(f"b{number}", BANK + f"question {number}", TWO) == other
        router.ended(f"b{number}")


def test_a_replica_that_has_too_much_under_way_spills_over_and_the_other_learns_the_beginning():
    router = policy(slack=2)
    home = router.choose("0", SHOP, TWO)
    same = [router.choose(str(number), SHOP, TWO) for number in (1, 2)]
    assert same == [home, home], "three under way against none is one more than the bound"
    spilled = router.choose("3", SHOP, TWO)
    assert spilled != home
    for number in range(4):
        router.ended(str(number))
    first = router.choose("4", SHOP, TWO)
    second = router.choose("5", SHOP, TWO)
    assert {first, second} == {*TWO}, "both hold it now, so the less loaded one is taken"


def test_only_what_is_under_way_counts():
    router = policy(slack=0)
    home = router.choose("0", SHOP, TWO)
    for number in range(1, 50):
        router.ended(str(number - 1))
        assert router.choose(str(number), SHOP, TWO) == home
    assert router.load(home) == 1


def test_short_prompts_take_turns():
    router = policy()
    chosen = []
    for number in range(8):
        chosen.append(router.choose(str(number), "hello", TWO))
        router.ended(str(number))
    assert Counter(chosen) == {"a": 4, "b": 4}


def test_a_session_stays_with_its_replica_unless_that_is_overloaded_or_gone():
    router = policy(slack=1)
    home = router.choose("0", "hello", TWO, session="ann")
    router.ended("0")
    for number in range(1, 6):
        assert router.choose(str(number), BANK, TWO, session="ann") == home
        router.ended(str(number))
    (left,) = {*TWO} - {home}
    for name in ("x", "y"):
        router.choose(name, "hi", [home])
    assert router.choose("7", "hello", TWO, session="ann") == left
    assert router.choose("8", "hello", ["c"], session="ann") == "c"


def test_a_replica_that_is_gone_is_not_chosen_for_what_it_held():
    router = policy()
    home = router.choose("0", SHOP, TWO)
    (left,) = {*TWO} - {home}
    assert router.choose("1", SHOP, [left, "c"]) in (left, "c")
    with pytest.raises(ValueError, match="no replica"):
        router.choose("2", SHOP, [])


def test_a_request_that_went_elsewhere_counts_there():
    router = policy()
    home = router.choose("0", SHOP, TWO)
    (other,) = {*TWO} - {home}
    router.moved("0", other)
    assert (router.load(home), router.load(other)) == (0, 1)
    router.ended("0")
    router.moved("0", home)
    assert (router.load(home), router.load(other)) == (0, 0)


def test_what_was_used_longest_ago_is_forgotten():
    router = policy(capacity=4)
    for number in range(100):
        router.choose("0", f"{number:032d}" * 3, TWO, session=str(number))
    assert len(router._homes) <= 4
    assert len(router._sessions) <= 4


@given(
    st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=120),
    st.integers(2, 5), st.integers(0, 6),
)  # fmt: skip
def test_no_replica_ever_has_more_than_the_slack_and_one_over_the_least_loaded(
    arrivals, count, slack
):
    router = policy(slack=slack)
    replicas = [f"r{number}" for number in range(count)]
    running: list[str] = []
    for number, (topic, finish) in enumerate(arrivals):
        before = min(map(router.load, replicas))
        chosen = router.choose(str(number), f"{topic}" * 64, replicas)
        running.append(str(number))
        assert router.load(chosen) <= before + slack + 1
        if finish:
            router.ended(running.pop(0))
    assert sum(map(router.load, replicas)) == len(running)
