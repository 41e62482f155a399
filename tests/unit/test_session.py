"""A session ends every process that carries its marker, without a Ray being started here."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import twinpath
from twinpath.errors import TwinpathError
from twinpath.online import session as session_module
from twinpath.online.environment import FAST_PATH
from twinpath.online.session import MARKER, PORTS, ServeSession, free_ports, serve_ports

pytestmark = pytest.mark.slow

STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "print('up', flush=True); time.sleep(60)"
)


@pytest.fixture
def session():
    session = ServeSession()
    yield session
    session.stop()


def test_what_these_have_started_is_of_the_session_without_any_marker(session: ServeSession):
    starts = (
        "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', "
        f"{STUBBORN!r}], env={{}}, start_new_session=True); "
        "print(child.pid, flush=True); child.wait()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", starts], env=session.env, stdout=subprocess.PIPE
    ) as mine:
        assert mine.stdout is not None
        child = int(mine.stdout.readline())
        assert mine.stdout.readline() == b"up\n"
        assert {process.pid for process in session.processes()} == {mine.pid, child}
        session.stop()
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_a_process_with_the_number_of_one_that_has_gone_is_of_the_session(
    session: ServeSession, monkeypatch: pytest.MonkeyPatch
):
    """psutil remembers what had the number when it was last asked for all."""
    with subprocess.Popen(
        [sys.executable, "-c", STUBBORN], env=session.env, stdout=subprocess.PIPE
    ) as mine:
        assert mine.stdout is not None
        assert mine.stdout.readline() == b"up\n"
        gone = psutil.Process(mine.pid)
        gone._ident = (mine.pid, 1.0)
        monkeypatch.setitem(psutil._pmap, mine.pid, gone)
        assert [process.pid for process in session.processes()] == [mine.pid]
        session.stop()


@pytest.mark.parametrize("lost", [(), (MARKER,), (MARKER, "RAY_AUTH_TOKEN")])
def test_what_carries_the_marker_is_ended_even_if_it_does_not_want_to(
    session: ServeSession, lost: tuple[str, ...]
):
    # A new session of the system: no parent or group leads to it any more. A process that changed
    # its title has lost some of its variables.
    env = {name: value for name, value in session.env.items() if name not in lost}
    mine = subprocess.Popen(
        [sys.executable, "-c", STUBBORN], env=env, stdout=subprocess.PIPE, start_new_session=True
    )
    other = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)"],
        env=os.environ | {MARKER: "another"},
    )
    try:
        assert mine.stdout is not None
        assert mine.stdout.readline() == b"up\n"
        assert [process.pid for process in session.processes()] == [mine.pid]
        session.stop()
        assert session.processes() == []
        assert not psutil.pid_exists(mine.pid)
        assert other.poll() is None, "what is not of this session is left alone"
    finally:
        for process in (mine, other):
            process.kill()
            process.wait()
        assert mine.stdout is not None
        mine.stdout.close()


def test_the_folder_goes_with_the_session_and_stopping_twice_is_harmless(session: ServeSession):
    assert session.folder.is_dir()
    session.stop()
    session.stop()
    assert not session.folder.exists()


def test_a_start_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch):
    def fail(self: ServeSession) -> None:
        raise TwinpathError("no")

    monkeypatch.setattr(ServeSession, "start", fail)
    failing = ServeSession()
    with pytest.raises(TwinpathError, match="no"):
        failing.__enter__()
    assert not failing.folder.exists()


def test_a_command_that_fails_says_what_it_printed(session: ServeSession):
    assert "Python" in session.command("python", "--version")
    with pytest.raises(TwinpathError, match=r"(?s)failed with 3.*the reason"):
        session.command("python", "-c", "print('the reason'); raise SystemExit(3)")


def test_waiting_for_what_never_comes_ends_with_the_address(session: ServeSession):
    began = time.monotonic()
    with pytest.raises(TwinpathError, match=rf"{session.url}/x/readyz was not ready in 0.5 s"):
        session.wait_until_ready("/x/readyz", timeout_s=0.5)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("offset", [0, 199])
def test_serve_of_a_session_gets_ports_that_nobody_listens_on(offset: int):
    taken = serve_ports()
    first = int(taken["RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT"])
    assert int(taken["RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT"]) == first + 198
    assert int(taken["RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"]) == first + 199
    grpc = int(taken["RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT"])
    assert int(taken["RAY_SERVE_FALLBACK_PROXY_GRPC_PORT"]) == grpc + 199
    with socket.socket() as listens:
        listens.bind(("127.0.0.1", first + offset))
        others = {serve_ports()["RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT"] for _ in range(200)}
    assert str(first) not in others
    assert len(others) > 5


def test_haproxy_is_asked_for_only_on_the_fast_path():
    given = {"RAY_SERVE_HAPROXY_NBTHREAD": "7"}
    sessions = [ServeSession(), ServeSession(fast_path=False), ServeSession(env=given)]
    try:
        fast, plain, own = sessions
        assert fast.env.items() >= FAST_PATH.items()
        assert str(fast.folder) in fast.env["RAY_SERVE_HAPROXY_SOCKET_PATH"]
        assert "RAY_SERVE_ENABLE_HA_PROXY" not in plain.env
        assert own.env["RAY_SERVE_HAPROXY_NBTHREAD"] == "7"
        assert len({fast.http_port, fast.gcs_port, fast.dashboard_port}) == 3
    finally:
        for each in sessions:
            each.stop()


def test_no_port_of_a_session_is_the_one_that_was_given(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(session_module, "free_ports", lambda n: list(range(31_000, 31_000 + n)))
    session = ServeSession(http_port=31_001)
    others = [session.gcs_port, session.dashboard_port, session.agent_port, session.grpc_port]
    for name in ("RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_HAPROXY_STATS_PORT"):
        others.append(int(session.env[name]))
    assert len({session.http_port, *others}) == 7
    session.stop()


def test_free_ports_are_different():
    assert len(set(free_ports(20))) == 20
    assert set(free_ports(20)) <= set(PORTS)


@pytest.mark.parametrize("first", ["SIGINT", "SIGTERM"])
def test_a_second_interrupt_does_not_cut_the_stopping_short(first: str):
    code = (
        "import os, signal, time\n"
        "from twinpath.online.session import interrupt_once\n"
        "interrupt_once()\n"
        "try:\n"
        f"    os.kill(os.getpid(), signal.{first})\n"
        "    time.sleep(20)\n"
        "except KeyboardInterrupt:\n"
        "    os.kill(os.getpid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(0.1)\n"
        "    print('stopped')\n"
    )
    library = str(Path(twinpath.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": library}, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert done.stdout == "stopped\n", done.stderr
