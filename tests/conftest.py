"""What holds for every test."""

from pathlib import Path

import pytest
from hypothesis import settings

from twinpath.online.session import ServeSession

HERE = Path(__file__).parent

# How long an example takes says nothing on a machine that does other work as well.
settings.register_profile("busy", deadline=None)
settings.load_profile("busy")
# There are many sessions here, and some process of Ray's always wants to be forced.
ServeSession.patience_s = 1.5


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start servers share two cores with all that they start: one that fails is run
    again, at most twice. The closing line of pytest counts these; tests in one process get none."""
    again = pytest.mark.flaky(reruns=2, reruns_delay=3)
    for item in items:
        folder = item.path.relative_to(HERE).parts[0] if item.path.is_relative_to(HERE) else ""
        if folder != "unit" and item.get_closest_marker("flaky") is None:
            item.add_marker(again)
