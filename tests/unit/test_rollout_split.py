"""Rows are shared out between versions: by key, for good, and evenly."""

import subprocess
import sys
import timeit

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twinpath.errors import InputError
from twinpath.rollout.split import Split, fractions
from twinpath.rollout.state import RolloutState, Status

KEYS = 100_000


def keys_of(kind):
    numbers = np.arange(KEYS)
    return {
        "int": numbers,
        "int32": numbers.astype(np.int32),
        "float": numbers.astype(np.float64),
        "text": np.array([f"customer-{n}" for n in numbers], object),
        "date": np.datetime64("2026-01-01T00:00:00", "us") + numbers,
    }[kind]


@pytest.mark.parametrize("kind", ["int", "int32", "float", "text", "date"])
@pytest.mark.parametrize("salt", ["r1", "another"])
def test_five_percent_of_keys_are_five_percent(kind, salt):
    parts = Split(salt, share=0.05, key=("k",)).parts({"k": keys_of(kind)})
    assert abs(parts.challenger.mean() - 0.05) <= 0.003


@pytest.mark.parametrize("kind", ["int", "text"])
def test_a_key_keeps_its_version_in_any_batch_and_order(kind):
    keys = keys_of(kind)[:20_000]
    split = Split("r", share=0.3, key=("k",))
    whole = split.parts({"k": keys}).challenger
    random = np.random.default_rng(0)
    order = random.permutation(len(keys))
    again = np.empty(len(keys), bool)
    for rows in np.array_split(order, 700):
        other = random.random(len(rows))  # a column that is no key
        again[rows] = split.parts({"k": keys[rows], "amount": other}).challenger
    assert (whole == again).all()


def test_a_key_that_is_in_stays_in_as_the_share_grows():
    columns = {"k": keys_of("int")}
    before = np.zeros(KEYS, bool)
    for share in (0.05, 0.25, 0.5, 1.0):
        now = Split("r", share, key=("k",)).parts(columns).challenger
        assert not (before & ~now).any()
        before = now
    assert before.all()


def test_another_rollout_begins_with_other_keys():
    columns = {"k": keys_of("int")}
    first = Split("r1", 0.05, key=("k",)).parts(columns).challenger
    second = Split("r2", 0.05, key=("k",)).parts(columns).challenger
    assert abs((first & second).mean() - 0.0025) < 0.001


def test_mirrored_rows_are_never_those_that_the_challenger_answers():
    parts = Split("r", share=0.2, mirror=0.3, key=("k",)).parts({"k": keys_of("int")})
    assert not (parts.challenger & parts.mirrored).any()
    assert abs(parts.mirrored.mean() - 0.3) < 0.006


def test_the_hash_is_one_in_every_process_and_for_every_width():
    code = (
        "import numpy as np; from twinpath.rollout.split import fractions; "
        "print(fractions({'a': np.array(['x', 'é'], object), 'n': np.array([1, -2])}, "
        "('a', 'n'), 'salt').tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    # A literal: rows of rollouts under way would change sides if the hash ever did.
    assert done.stdout.strip() == "[0.45846064662076125, 0.2141812869348596]"
    for dtype in (np.int8, np.int32, np.int64):
        columns = {"a": np.array(["x", "é"], object), "n": np.array([1, -2], dtype)}
        assert str(fractions(columns, ("a", "n"), "salt").tolist()) == done.stdout.strip()
    narrow = fractions({"f": np.array([0.5, np.nan], np.float32)}, None, "s")
    wide = fractions({"f": np.array([0.5, -np.nan], np.float64)}, None, "s")
    assert (narrow == wide).all()


def test_without_a_key_equal_rows_go_together_and_others_spread():
    random = np.random.default_rng(1)
    n = 20_000
    rows = {f"f{i}": random.integers(0, 4, n).astype(float) for i in range(12)}
    rows |= {"t": random.normal(size=(n, 3)), "c": np.array(["a", "b"] * (n // 2), object)}
    at = fractions(rows, None, "s")
    assert abs((at < 0.5).mean() - 0.5) < 0.02
    assert (at == fractions(dict(reversed(rows.items())), None, "s")).all()
    swapped = rows | {"f0": rows["f1"], "f1": rows["f0"]}
    differ = rows["f0"] != rows["f1"]
    assert (at[differ] != fractions(swapped, None, "s")[differ]).mean() > 0.99


def test_tensors_of_text_and_numbers_are_keys_too():
    columns = {
        "text": np.array([["a", "b"], ["a", "c"], ["a", "b"]], object),
        "ids": np.array([[1, 2], [1, 2], [1, 2]]),
    }
    at = fractions(columns, ("text", "ids"), "s")
    assert at[0] == at[2] != at[1]


def test_a_missing_key_column_is_named():
    with pytest.raises(InputError, match=r"'customer'.*Did you mean 'customers'"):
        Split("r", 0.1, key=("customer",)).parts({"customers": np.arange(3)})


def test_a_rollout_that_is_over_sends_everything_to_the_incumbent():
    state = RolloutState(id="r", model="m", incumbent="1", challenger="2", share=0.5)
    columns = {"k": np.arange(1000)}
    assert 400 < Split.of(state).parts(columns).challenger.sum() < 600
    over = Split.of(state.but(status=Status.ROLLED_BACK))
    assert not over.parts(columns).challenger.any()


def test_all_and_nothing_are_exact():
    columns = {"k": np.arange(50)}
    assert Split("r", 1.0).parts(columns).challenger.all()
    assert not Split("r", 0.0).parts(columns).challenger.any()


def test_no_rows_are_no_rows():
    assert len(Split("r", 0.5, key=("k",)).parts({"k": np.array([], object)}).challenger) == 0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.one_of(st.none(), st.text(), st.integers(), st.floats()), max_size=20))
def test_any_value_is_a_key(values):
    column = np.empty(len(values), object)
    column[:] = values
    at = fractions({"k": column}, ("k",), "s")
    assert ((at >= 0) & (at < 1)).all()
    assert (at == fractions({"k": column}, ("k",), "s")).all()


def test_splitting_is_cheap_beside_a_model():
    """Generous multiples of what it takes (16 µs and 1.4 ms), for a machine that is busy."""
    few = {"k": np.array([f"customer-{n}" for n in range(64)], object)}
    many = {"k": np.arange(100_000)}
    split = Split("r", 0.3, key=("k",))
    assert min(timeit.repeat(lambda: split.parts(few), number=50, repeat=9)) / 50 < 300e-6
    assert min(timeit.repeat(lambda: split.parts(many), number=1, repeat=9)) < 30e-3
