"""Native threads of a model's libraries, held to what a replica is meant to use.

Replicas are what scales: OpenMP threads that outnumber the free CPUs make a single row ten times
slower.
"""

import contextlib
import os
from collections.abc import Callable
from typing import Any


def one_thread(limit: int) -> Callable[[], Any]:
    """A context manager for calls that may use OpenMP: at most ``limit`` threads inside. Finding
    the loaded libraries takes milliseconds, so it is done once, here."""
    if os.environ.get("OMP_NUM_THREADS") == "1" and limit == 1:
        return contextlib.nullcontext
    try:
        from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]
    except ImportError:
        return contextlib.nullcontext
    controller = ThreadpoolController()
    # Only pools that are wider than that have to be told, and telling costs microseconds.
    wide = [one for one in controller.info() if one["num_threads"] > limit]
    if not wide:
        return contextlib.nullcontext
    return lambda: controller.limit(limits=limit)
