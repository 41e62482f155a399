"""Ray's housekeeping behind what answers requests.

Beside its replicas a node of Ray has a dozen processes: the dashboard's, agents, monitors, Serve's
controller, its Python proxies. All wake up many times a second, and Linux lets who has slept go
first: where cores are few, a token or an answer waits meanwhile. So they get a higher niceness
(setpriority(2)), which no process needs a privilege for among those of its own user.

The raylet, and the actor that starts HAProxy, stay as they are: what they start inherits their
niceness, and would be slow. So do Serve's Python proxies where requests pass through them, and
whatever descends from a raylet and is none of Ray's own.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from twinpath.online.environment import NICENESS

#: Serve's own logger, so that it stands in the replica's log.
_LOG = logging.getLogger("ray.serve")
#: Children of a raylet that are neither replicas nor tasks, by the beginning of their titles.
_ACTORS = ("ray::ServeController", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
#: No request passes through it while HAProxy is there and an application has a replica.
_PROXY = "ray::ProxyActor"
#: The one starts workers, and the other is what all wait for.
_CORE = ("raylet", "gcs_server")
_CLIENT_SERVER = "ray.util.client.server"
#: Of the Ray Client, for one user's driver: its calls go through it.
_FOR_A_DRIVER = "--mode=specific-server"


def put_behind(env: Mapping[str, str]) -> list[int]:
    """From a replica: let the housekeeping of its node be as nice as ``env`` says; the ids of its
    processes. None where nothing is said, where this process is no worker of Ray, or on a system
    other than Linux, whose threads have a niceness each."""
    given = env.get(NICENESS) or "0"
    if not given.isdigit():
        _LOG.warning(
            "%s is %r: expected 0 to 19; Ray's processes stay as they are", NICENESS, given
        )
        return []
    niceness = int(given)
    if not niceness or sys.platform != "linux":
        return []
    found = []
    with contextlib.suppress(psutil.Error, OSError):
        raylets = [each for each in psutil.Process().parents() if each.name() == "raylet"]
        proxied = env.get("RAY_SERVE_ENABLE_HA_PROXY") != "1"
        for process in housekeeping(raylets[0], proxied=proxied) if raylets else ():
            if _be_nice(process, niceness):
                found.append(process.pid)
    return found


def _be_nice(process: psutil.Process, niceness: int) -> bool:
    """Whether all threads are that nice. What has ended meanwhile, or is of another user, stays."""
    with contextlib.suppress(psutil.Error, OSError):
        for _ in range(2):  # threads that began meanwhile have it from those that began them
            for thread in process.threads():
                with contextlib.suppress(ProcessLookupError):
                    if os.getpriority(os.PRIO_PROCESS, thread.id) < niceness:
                        os.setpriority(os.PRIO_PROCESS, thread.id, niceness)
        return True
    return False


def housekeeping(raylet: psutil.Process, *, proxied: bool = False) -> Iterator[psutil.Process]:
    """Processes of the raylet's cluster on this machine that answers do not wait for; with
    ``proxied`` they do for Serve's Python proxies."""
    titles = _ACTORS if proxied else (*_ACTORS, _PROXY)
    for child in raylet.children():
        with contextlib.suppress(psutil.Error):
            if " ".join(child.cmdline()).startswith(titles):
                yield child
    marks = _marks(raylet.cmdline())
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if _of_ray(words) and _has(words, marks):
                for each in (process, *process.children(recursive=True)):
                    if not _answers(each):
                        yield each


def _answers(process: psutil.Process) -> bool:
    """Whether it is what others wait for, or descends from a raylet: a worker has no title yet
    while it starts, and may have a wrapper for its parent."""
    names = (process.name(), *(each.name() for each in process.parents()))
    return process.name() in _CORE or "raylet" in names or _FOR_A_DRIVER in process.cmdline()


def _marks(words: list[str]) -> tuple[str, ...]:
    """What the processes of this cluster have in their command lines: its session and address."""
    options = dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)
    found = (options.get("--session-name"), options.get("--gcs-address"))
    return tuple(each for each in found if each)


def _of_ray(words: list[str]) -> bool:
    import ray

    folder = str(Path(ray.__file__).parent)
    return any(word.startswith(folder) for word in words[1:]) or _CLIENT_SERVER in words


def _has(words: list[str], marks: tuple[str, ...]) -> bool:
    return any(mark in word for word in words for mark in marks)
