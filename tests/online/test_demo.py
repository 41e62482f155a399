"""`make demo`'s program, from nothing to Ctrl-C."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from twinpath.online.session import MARKER, free_ports

ROOT = Path(__file__).resolve().parents[2]


def session_processes(marker: str) -> list[psutil.Process]:
    found = []
    for pid in psutil.pids():
        try:
            # Raw: a process that sets its title overwrites the start of the block with NULs.
            if f"{MARKER}={marker}".encode() in Path(f"/proc/{pid}/environ").read_bytes():
                found.append(psutil.Process(pid))
        except (psutil.Error, OSError):
            continue
    return found


@pytest.mark.timeout(600)
def test_the_demo_serves_agrees_and_leaves_nothing_behind(tmp_path):
    port = free_ports(1)[0]
    log = tmp_path / "demo.log"
    env = os.environ | {
        "TWINPATH_FLIGHTS_DIR": str(tmp_path / "flights"),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "platform"), str(ROOT)]),
        "COLUMNS": "200",
    }
    with log.open("wb") as sink:
        demo = subprocess.Popen(
            [sys.executable, "-m", "graphs.demo", "--port", str(port)],
            cwd=ROOT, env=env, stdout=sink, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            deadline_s = time.monotonic() + 480
            while "Ctrl-C" not in log.read_text():
                assert demo.poll() is None, log.read_text()
                assert time.monotonic() < deadline_s, log.read_text()
                time.sleep(0.5)
            text = log.read_text()
            answer = httpx.get(f"http://127.0.0.1:{port}/readyz")
            assert answer.status_code == 200
            marker = re.search(r"token (\w{32})", text)[1]
            names = {process.name() for process in session_processes(marker)}
            assert {"raylet", "haproxy"} <= names
        finally:
            for _ in range(3):  # as of somebody impatient
                demo.send_signal(signal.SIGINT)
                time.sleep(0.05)
            demo.wait(timeout=60)
    text = log.read_text()
    agreement = re.search(
        r"agree on ([\d,]+) real rows: max \|difference\| of p_delay (\S+),", text
    )
    assert int(agreement[1].replace(",", "")) >= 1000
    assert float(agreement[2]) <= 1e-9
    model, baseline = map(float, re.search(r"model ([\d.]+), .*baseline ([\d.]+)", text).groups())
    assert model > baseline + 0.05
    assert int(re.search(r"([\d,]+) requests/s", text)[1].replace(",", "")) > 0
    assert demo.returncode == 0, text
    assert "Nothing is left running." in text
    assert session_processes(marker) == []
