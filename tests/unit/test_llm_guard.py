"""What an engine starts ends with the process that started it. The engine here is `sleep`."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from twinpath.nodes.llm_guard import MARKER, EngineGuard, marked

ROOT = Path(__file__).resolve().parents[2]
PARENT = """
import os, subprocess, sys, time
from twinpath.nodes.llm_guard import EngineGuard
guard = EngineGuard()
with guard.marking():
    # One that starts another in a session of its own, where no signal to the group comes.
    subprocess.Popen(["sh", "-c", "setsid sleep 300 & exec sleep 300"])
print(guard.marker, flush=True)
time.sleep(300)
"""


def until(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.02)


def test_processes_of_an_engine_end_with_a_parent_that_is_killed():
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "platform")},
    )
    try:
        assert parent.stdout is not None
        marker = parent.stdout.readline().strip()
        until(lambda: len(marked(marker)) == 2, "both have started")
    finally:
        parent.kill()
        parent.wait()
    until(lambda: marked(marker) == [], "both have ended")


def test_the_end_of_a_guard_is_the_end_of_the_engine_and_of_nothing_else():
    guard, other = EngineGuard(), EngineGuard()
    with guard.marking():
        mine = subprocess.Popen(["sleep", "300"])
    with other.marking():
        theirs = subprocess.Popen(["sleep", "300"])
    try:
        assert MARKER not in os.environ
        until(lambda: guard.processes() == [mine.pid], "it is marked")
        guard.end()
        assert mine.wait(10) == -9
        assert theirs.poll() is None
        assert other.processes() == [theirs.pid]
    finally:
        other.end()
        theirs.wait(10)
    guard.end()  # harmless


def test_a_guard_waits_in_a_session_of_its_own():
    guard = EngineGuard()
    try:
        # A process has its own command line only once it has begun its program.
        until(lambda: len(_watchers(guard)) == 1, "the watcher has begun")
        [watcher] = _watchers(guard)
        assert os.getsid(watcher) != os.getsid(0)
    finally:
        guard.end()


def _watchers(guard: EngineGuard) -> list[int]:
    return [
        int(pid.name)
        for pid in Path("/proc").iterdir()
        if pid.name.isdigit() and guard.marker.encode() in _line(pid)
    ]


def _line(folder: Path) -> bytes:
    try:
        return (folder / "cmdline").read_bytes()
    except OSError:
        return b""
