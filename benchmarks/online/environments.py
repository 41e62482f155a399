"""A virtual environment for each peer, made on first use from its frozen pins."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

PINS = Path(__file__).parent / "peers"
#: Another folder keeps them across checkouts: they take more than a gigabyte each.
FOLDER_VARIABLE = "BENCHMARK_PEERS"
_STAMP = "pins.sha256"
_TIMEOUT_S = 1800


class PeerError(Exception):
    """A peer that could not be installed, started or believed; the text says why."""


def folder() -> Path:
    """Where the environments are; made with a file that hides it from git."""
    default = Path(__file__).resolve().parents[1] / ".peers"
    found = Path(os.environ.get(FOLDER_VARIABLE, default))
    found.mkdir(parents=True, exist_ok=True)
    (found / ".gitignore").write_text("*\n")
    return found


def ensure(name: str) -> Path:
    """The peer's environment, made anew when its pins have changed. Raises PeerError."""
    pins = PINS / f"{name}.txt"
    wanted = hashlib.sha256(pins.read_bytes()).hexdigest()
    place = folder() / name
    stamp = place / _STAMP
    if stamp.exists() and stamp.read_text() == wanted:
        return place
    _run("venv", [sys.executable, "-m", "venv", "--clear", str(place)])
    _run("pip", [str(place / "bin" / "pip"), "install", "--quiet", "-r", str(pins)])
    stamp.write_text(wanted)
    return place


def _run(what: str, command: list[str]) -> None:
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=_TIMEOUT_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise PeerError(f"{what} took more than {_TIMEOUT_S} s") from None
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if line.startswith("ERROR")]
        raise PeerError(f"{what} failed: {' '.join(lines[-2:])[-500:] or done.stdout[-500:]}")
