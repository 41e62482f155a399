"""No engine outlives the process that started it, however that process ends.

An engine runs in processes of its own. When their parent is killed they go on, and hold memory or
a GPU. A guard, one more small process in a session of its own, waits for the parent's end and then
kills whatever carries the engine's marker in its environment, which every process inherits that the
engine starts. Linux only (``pidfd_open``). This file runs as a script, so it needs nothing but the
standard library.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

MARKER = "TWINPATH_ENGINE"


class EngineGuard:
    """Guards the processes that are started inside ``with guard.marking():``."""

    def __init__(self) -> None:
        self.marker = uuid.uuid4().hex
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(os.getpid()), self.marker],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            close_fds=True,
        )

    @contextlib.contextmanager
    def marking(self) -> Iterator[None]:
        """Processes that are started meanwhile, and theirs, are the engine's."""
        os.environ[MARKER] = self.marker
        try:
            yield
        finally:
            os.environ.pop(MARKER, None)

    def processes(self) -> list[int]:
        """Ids of the engine's processes that live."""
        return marked(self.marker)

    def end(self) -> None:
        """Kill what is left of the engine, and the guard. Harmless when it was done before."""
        kill(self.marker)
        self._guard.kill()
        self._guard.wait()


def marked(marker: str) -> list[int]:
    """Ids of processes, zombies excepted, that carry the marker.

    The raw block is searched: a process that changes its title, as engines do, overwrites the start
    of it.
    """
    wanted = f"{MARKER}={marker}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            with contextlib.suppress(OSError):
                if wanted in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
    return found


def kill(marker: str, patience_s: float = 10.0) -> None:
    """Kill every process that carries the marker, those that start meanwhile too."""
    deadline_s = time.monotonic() + patience_s
    while (found := marked(marker)) and time.monotonic() < deadline_s:
        for pid in found:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def watch(parent: int, marker: str) -> None:
    """Wait until the parent has ended, then kill the engine."""
    with contextlib.suppress(ProcessLookupError):
        handle = os.pidfd_open(parent)
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        # With another parent by now, the first one ended before it could be watched.
        if os.getppid() == parent:
            poll.poll()
    kill(marker)


if __name__ == "__main__":
    watch(int(sys.argv[1]), sys.argv[2])
