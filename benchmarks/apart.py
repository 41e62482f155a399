"""Steps of a benchmark in processes of their own: nothing that one leaves behind helps another."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
_RESULT = "RESULT "


def apart(
    module: str, step: str, folder: Path, env: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What ``python -m module step folder`` gave to `tell`; at most 5 minutes. Raises SystemExit
    with the end of its log when it fails."""
    path = os.pathsep.join([str(ROOT / "platform"), str(ROOT), str(ROOT / "tests")])
    more = {"PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}
    log = folder / f"{step}.log"
    with log.open("wb") as sink:
        done = subprocess.run(
            [sys.executable, "-m", module, step, str(folder)],
            env=os.environ | more | dict(env or {}), cwd=ROOT, stdout=sink,
            stderr=subprocess.STDOUT, timeout=300,
        )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{step} failed:\n{log.read_text()[-3000:]}")
    found: dict[str, Any] = json.loads(log.read_text().split(_RESULT)[1].splitlines()[0])
    return found


def tell(result: Mapping[str, Any]) -> None:
    """Give the result of this process to the one that waits for it."""
    print(_RESULT + json.dumps(dict(result)), flush=True)


def turns(ways: tuple[str, ...], rounds: int, console: Console) -> Iterator[str]:
    """The ways of each round, forwards and backwards, so that a machine's drift cancels."""
    for number in range(rounds):
        for way in ways if number % 2 == 0 else reversed(ways):
            with console.status(f"round {number + 1} of {rounds}: {way}"):
                yield way
