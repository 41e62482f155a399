"""Measures of skew on columns whose differences are known."""

import numpy as np
import pytest

from twinpath.features.skew import compare

RNG = np.random.default_rng(3)
VALUES = RNG.normal(10, 2, 1000)


def test_the_same_values_are_equal_and_missing_equals_missing():
    values = VALUES.copy()
    values[::7] = np.nan
    found = compare("x", values, values.copy())
    assert found["equal"] == 1
    assert found["max_difference"] == found["psi"] == found["wasserstein"] == 0
    assert found["missing_online"] == found["missing_offline"] == pytest.approx(143 / 1000)


def test_a_constant_shift_is_seen_by_every_measure():
    found = compare("x", VALUES + 3, VALUES)
    assert found["equal"] == 0
    assert found["max_difference"] == pytest.approx(3)
    assert found["psi"] > 0.5
    assert found["wasserstein"] == pytest.approx(3 / VALUES.std())


def test_values_in_another_order_differ_by_row_and_not_as_a_distribution():
    found = compare("x", VALUES[::-1].copy(), VALUES)
    assert found["equal"] < 0.01
    assert found["psi"] == pytest.approx(0)
    assert found["wasserstein"] == pytest.approx(0)


def test_a_value_that_is_missing_on_one_side_is_not_equal():
    online = VALUES.copy()
    online[:200] = np.nan
    found = compare("x", online, VALUES)
    assert found["equal"] == 0.8
    assert found["psi"] > 0.2
    assert (found["missing_online"], found["missing_offline"]) == (0.2, 0)


def test_a_tolerance_is_relative():
    found = compare("x", VALUES * (1 + 1e-7), VALUES, tolerance=1e-6)
    assert found["equal"] == 1
    assert compare("x", VALUES * (1 + 1e-7), VALUES)["equal"] < 0.01


def test_texts_truth_values_integers_and_moments_are_compared():
    texts = np.array(["a", "b", None, "c"] * 50, object)
    other = np.array(["a", "b", None, "x"] * 50, object)
    found = compare("t", other, texts)
    assert found["equal"] == 0.75
    assert found["max_difference"] is None
    assert found["psi"] > 0.2
    flags = np.array([True, False] * 50)
    assert compare("f", ~flags, flags)["equal"] == 0
    # A captured integer column with nulls comes back as objects.
    counted = np.array([1, None, 3], object)
    assert compare("i", counted, np.array([1.0, np.nan, 4.0]))["equal"] == pytest.approx(2 / 3)
    moments = np.array(["2024-01-01", "NaT"], "datetime64[us]")
    later = moments + np.timedelta64(1, "h")
    assert compare("m", later, moments)["max_difference"] == 3600
    assert compare("m", moments, moments)["equal"] == 1


def test_a_constant_feature_has_finite_measures():
    found = compare("x", np.full(10, 2.0), np.full(10, 1.0))
    assert found["equal"] == 0
    assert np.isfinite(found["psi"])
    assert found["wasserstein"] == 1
    nothing = compare("x", np.full(10, np.nan), np.full(10, np.nan))
    assert (nothing["equal"], nothing["psi"]) == (1, 0)
