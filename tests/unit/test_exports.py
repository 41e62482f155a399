"""What is public is what ``__all__`` says, and it is there."""

import pytest

import twinpath


@pytest.mark.parametrize("name", twinpath.__all__)
def test_an_exported_name_exists(name):
    assert getattr(twinpath, name) is not None


def test_exports_are_unique_and_documented():
    assert len(set(twinpath.__all__)) == len(twinpath.__all__)
    for name in set(twinpath.__all__) - {"ROW_ERROR", "Columns"}:
        assert getattr(twinpath, name).__doc__, name


def test_a_name_that_is_not_exported_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nonsense"):
        _ = twinpath.nonsense
