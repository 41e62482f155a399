"""The memory budget refuses with numbers, and a load cannot take more than it may."""

import os
import subprocess
import sys

import pytest

from twinpath.errors import MemoryBudgetError
from twinpath.registry.memory import Budget, Memory, host_memory

GIB = 1 << 30
MACHINE = Memory(16 * GIB, 8 * GIB)


def test_what_fits_may_take_all_that_is_free_but_the_headroom():
    assert Budget().admit(GIB, 0, MACHINE) == 6 * GIB


def test_a_version_that_does_not_fit_the_machine_is_refused_with_every_number():
    with pytest.raises(MemoryBudgetError) as caught:
        Budget().admit(7 * GIB, 0, MACHINE)
    text = str(caught.value)
    for part in ("7.00 GiB of host memory", "6.00 GiB", "8.00 GiB of 16.00 GiB are free", "12.5%"):
        assert part in text


def test_a_budget_counts_what_other_versions_hold():
    budget = Budget(limit_bytes=4 * GIB)
    assert budget.admit(GIB, 2 * GIB, MACHINE) == 3.5 * GIB - 2 * GIB
    with pytest.raises(MemoryBudgetError, match=r"other versions hold 3\.00 GiB"):
        budget.admit(GIB, 3 * GIB, MACHINE)


def test_this_machine_has_memory():
    found = host_memory()
    assert 0 < found.free_bytes <= found.total_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="limits of this kind are Linux's")
def test_asking_for_too_much_raises_and_the_process_goes_on():
    script = """
import numpy as np
from twinpath.registry.memory import limited
with limited(64 << 20):
    np.ones(32 << 20, np.uint8)
    try:
        np.ones(2 << 30, np.uint8)
    except MemoryError:
        print("refused")
print("after", len(np.ones(1 << 30, np.uint8)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.stdout.split() == ["refused", "after", str(1 << 30)]
