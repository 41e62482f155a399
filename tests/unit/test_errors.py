"""One exception tree, each class with a stable code."""

import pickle

import pytest

from twinpath import errors
from twinpath.errors import OverloadedError, TwinpathError, did_you_mean, http_status_of

CLASSES = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, TwinpathError)
]


def test_codes_are_unique():
    codes = [cls.code for cls in CLASSES]
    assert len(set(codes)) == len(codes)


@pytest.mark.parametrize("cls", CLASSES)
def test_every_code_has_its_class_status(cls):
    assert http_status_of(cls.code) == cls.http_status


def test_the_tree_at_the_top_of_the_module_is_complete():
    for cls in CLASSES:
        assert f"{cls.__name__} " in (errors.__doc__ + " ") or cls is TwinpathError
        assert cls is TwinpathError or cls.code in errors.__doc__


def test_an_unknown_code_is_500():
    assert http_status_of("nonsense") == 500


def test_an_overload_keeps_its_retry_hint_through_pickle():
    error = pickle.loads(pickle.dumps(OverloadedError("full", retry_after_s=2.5)))
    assert (error.message, error.retry_after_s) == ("full", 2.5)


def test_a_hint_names_the_closest_or_lists_all():
    assert did_you_mean("carier", ["carrier", "origin"]) == " Did you mean 'carrier'?"
    assert did_you_mean("zzz", ["b", "a"]) == " Known: 'a', 'b'."
