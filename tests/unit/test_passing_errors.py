"""Rows of a batch job that failed for now."""

import pytest

pytest.importorskip("ray.data")

from twinpath.errors import RetryLaterError
from twinpath.graph.columns import RowError
from twinpath.offline.stages import _raise_passing


def test_what_fails_for_now_is_no_dead_letter():
    _raise_passing({0: RowError("invalid_input", "no"), 1: RowError("unknown", "no")})
    for code in ("retry_later", "overloaded"):
        with pytest.raises(RetryLaterError, match="its engine is busy"):
            _raise_passing(
                {0: RowError("row_failed", "no"), 1: RowError(code, "its engine is busy")}
            )
