"""Ray's housekeeping behind what answers requests.

Beside its replicas a node of Ray has a dozen processes: the dashboard's, agents, monitors, Serve's
controller, its Python proxies. All wake up many times a second, and Linux lets who has slept go
first: where cores are few, a token or an answer waits meanwhile. So they get a higher niceness
(setpriority(2)), which no process needs a privilege for among those of its own user.

The raylet, and the actor that starts HAProxy, stay as they are: what they start inherits their
niceness, and would be slow.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from twinpath.online.environment import NICENESS

#: Children of a raylet that are neither replicas nor tasks, by the beginning of their titles.
_ACTORS = ("ray::ServeController", "ray::ProxyActor", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
#: Neither: the one starts workers, and the other is what all wait for.
_CORE = ("raylet", "gcs_server")
_CLIENT_SERVER = "ray.util.client.server"


def put_behind(env: Mapping[str, str]) -> list[int]:
    """From a replica: let the housekeeping of its node be as nice as ``env`` says; the ids of its
    processes. None where nothing is said, or where this process is no worker of Ray."""
    niceness = int(env.get(NICENESS) or 0)
    raylet = psutil.Process(os.getppid())
    if not niceness or raylet.name() != "raylet":
        return []
    found = []
    for process in housekeeping(raylet):
        # One may have ended, or belong to someone else.
        with contextlib.suppress(psutil.Error, OSError):
            for thread in process.threads():
                if os.getpriority(os.PRIO_PROCESS, thread.id) < niceness:
                    os.setpriority(os.PRIO_PROCESS, thread.id, niceness)
            found.append(process.pid)
    return found


def housekeeping(raylet: psutil.Process) -> Iterator[psutil.Process]:
    """Processes of the raylet's cluster on this machine that no request passes through."""
    for child in raylet.children():
        with contextlib.suppress(psutil.Error):
            if " ".join(child.cmdline()).startswith(_ACTORS):
                yield child
    marks = _marks(raylet.cmdline())
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if process.name() in _CORE or not _of_ray(words) or not _has(words, marks):
                continue
            parent = process.parent()
            # Else it is a worker that has no title yet.
            if parent is None or parent.name() != "raylet":
                yield process
                yield from process.children(recursive=True)


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
