"""Processes of engines on Ray Serve, as the operating system shows them."""

import contextlib
import time
from collections.abc import Sequence

import psutil

from twinpath.online.session import ServeSession

#: In the title that vLLM gives an engine's process, or in the command of one that has kept its own:
#: setproctitle does nothing where the first variable of the environment has been changed.
ENGINE = ("EngineCore", "multiprocessing.spawn")
#: Part of a core that an engine without sequences stays below; one that writes takes all of one.
IDLE = 0.2


def replicas_of(session: ServeSession, app: str, deployment: str = "") -> list[psutil.Process]:
    """The processes of an application's replicas."""
    return [
        process
        for process in session.processes()
        if f"ServeReplica:{app}:{deployment}" in _title(process)
    ]


def engines_of(session: ServeSession, app: str) -> list[psutil.Process]:
    """The engine processes that an application's replicas have started."""
    return [
        child
        for replica in replicas_of(session, app)
        for child in replica.children(recursive=True)
        if any(word in _title(child) for word in ENGINE)
    ]


def _title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def worked_s(engines: Sequence[psutil.Process]) -> float:
    """Seconds of a core that engines have taken so far."""
    return sum(sum(engine.cpu_times()[:2]) for engine in engines)


def rest_within(engines: Sequence[psutil.Process], within_s: float) -> bool:
    """Whether engines take no more of the processor after so long from now."""
    time.sleep(within_s)
    before_s, since_s = worked_s(engines), time.monotonic()
    time.sleep(0.5)
    return worked_s(engines) - before_s < IDLE * (time.monotonic() - since_s)
