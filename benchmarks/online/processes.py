"""A server in processes of its own: started, awaited, stopped while others are measured, and ended
with all its children."""

import contextlib
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.online.environments import PeerError

#: An engine that compiles its model takes more than a minute.
_READY_S = 240.0


@dataclass(frozen=True)
class Served:
    """A server that runs: its inference URL, and its processes. Between ``pause`` and ``resume``
    it takes nothing of the machine's cores; some servers poll even when nobody asks them."""

    url: str
    processes: Callable[[], Sequence[psutil.Process]]

    def pause(self) -> None:
        """Stop every process where it is."""
        self._send(signal.SIGSTOP)

    def resume(self) -> None:
        """Let every process go on."""
        self._send(signal.SIGCONT)

    def _send(self, number: int) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)


@contextlib.contextmanager
def running(
    command: Sequence[str], ready_url: str, folder: Path, env: Mapping[str, str]
) -> Iterator[Callable[[], Sequence[psutil.Process]]]:
    """The command in ``folder`` while the block runs, from when ``ready_url`` answers 200; gives
    what lists its processes.

    Raises PeerError with the end of its log when it ends or is not ready in time.
    """
    log = folder / "server.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command, cwd=folder, env=dict(env), stdout=sink, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    try:
        _wait(process, ready_url, log)
        yield lambda: _family(process)
    finally:
        _end(process)


def _wait(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    deadline_s = time.monotonic() + _READY_S
    while time.monotonic() < deadline_s and process.poll() is None:
        with (
            contextlib.suppress(urllib.error.URLError, OSError),
            urllib.request.urlopen(url, timeout=2) as answer,
        ):
            if answer.status == 200:
                return
        time.sleep(0.1)
    how = "was not ready in time" if process.poll() is None else f"ended: {process.returncode}"
    raise PeerError(f"the server {how}; its log ends: {log.read_text(errors='replace')[-1500:]}")


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ask, then force: the process, its children, and whatever else is in its session."""
    family = _family(process)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=5)
    for each in {*alive, *_session(process.pid)}:
        with contextlib.suppress(psutil.Error):
            each.kill()
    process.wait(timeout=10)


def _family(process: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    family = [psutil.Process(process.pid)] if process.poll() is None else []
    for parent in list(family):
        with contextlib.suppress(psutil.Error):
            family += parent.children(recursive=True)
    return family + [each for each in _session(process.pid) if each not in family]


def _session(leader: int) -> list[psutil.Process]:
    found = []
    for pid in psutil.pids():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getsid(pid) == leader:
                found.append(psutil.Process(pid))
    return found
