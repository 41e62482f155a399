"""A private Ray with Serve on this machine, and the certainty that nothing of it survives.

Ray's own stop leaves HAProxy and engine processes behind. Every process that a session starts
inherits a marker in its environment; when the session ends, whatever still carries it is ended.
"""

import collections
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from twinpath.errors import TwinpathError
from twinpath.online.environment import FAST_PATH, GRPC_SERVICES, haproxy_files

MARKER = "TWINPATH_SESSION"
#: Ports of sessions: above those of replicas (`serve_ports`, and Serve's own from 30000 up).
PORTS = range(31_000, 32_768)
#: Answers in a row that make an application ready, a tenth of a second apart.
READY_IN_A_ROW = 10


class ServeSession:
    """``with ServeSession(num_cpus=8) as session:`` starts a Ray head with its own folder and
    ports; ``session.env`` makes ``serve``, ``ray job`` and ``ray.init`` talk to it.

    ``fast_path`` puts HAProxy in front. ``pythonpath`` is what workers can import from.
    ``head_only``: no proxy on other nodes, which on one machine would want the same port. Raises
    TwinpathError when Ray does not start, with the end of its log.
    """

    #: Seconds that its processes have to end when they are asked to.
    patience_s = 6.0

    def __init__(
        self,
        *,
        num_cpus: int = 8,
        fast_path: bool = True,
        http_port: int | None = None,
        pythonpath: Sequence[Path | str] = (),
        env: Mapping[str, str] | None = None,
        head_only: bool = False,
    ) -> None:
        self._num_cpus, self._head_only = num_cpus, head_only
        # At once, and none that is given, as nobody listens on them yet.
        ports = [port for port in free_ports(8) if port != http_port][:7]
        self.gcs_port, self.dashboard_port, self.agent_port = ports[0], ports[1], ports[6]
        self.http_port, self.grpc_port = http_port or ports[2], ports[5]
        # Short, because socket paths below it may have 107 bytes at most.
        self.folder = Path(tempfile.mkdtemp(prefix="tw-"))
        self.marker = uuid.uuid4().hex
        #: In several variables of each process of this session.
        self._marks = (self.marker, self.folder.name)
        self.env = os.environ | dict(env or {})
        self.env.pop("PYTHONDONTWRITEBYTECODE", None)
        self.env |= serve_ports()
        if fast_path:
            (self.folder / "haproxy").mkdir()
            self.env |= FAST_PATH | haproxy_files(self.folder / "haproxy", ports[3], ports[4])
            self.env |= dict(env or {})
        else:
            for name in FAST_PATH:
                self.env.pop(name, None)
        paths = [str(path) for path in pythonpath] + [self.env.get("PYTHONPATH", "")]
        self.env |= {
            MARKER: self.marker,
            # A job's entrypoint is a command line: its `python` must be this one.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{self.env.get('PATH', os.defpath)}",
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "RAY_ADDRESS": f"127.0.0.1:{self.gcs_port}",
            "RAY_DASHBOARD_ADDRESS": self.dashboard_url,
            "RAY_API_SERVER_ADDRESS": self.dashboard_url,
            "RAY_USAGE_STATS_ENABLED": "0",
            # Nobody else on this machine may submit work to it.
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.marker,
        }

    @property
    def dashboard_url(self) -> str:
        """Where ``serve deploy`` and ``ray job submit`` send their requests."""
        return f"http://127.0.0.1:{self.dashboard_port}"

    @property
    def url(self) -> str:
        """Where Serve answers."""
        return f"http://127.0.0.1:{self.http_port}"

    def __enter__(self) -> "ServeSession":
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the head node, and Serve on it."""
        self.command(
            "ray", "start", "--head", f"--port={self.gcs_port}", f"--num-cpus={self._num_cpus}",
            "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={self.dashboard_port}", "--disable-usage-stats",
            f"--temp-dir={self.folder}", "--include-dashboard=true",
            f"--dashboard-agent-listen-port={self.agent_port}",
            without=("RAY_ADDRESS",),
        )  # fmt: skip
        self.start_serve()

    def start_serve(self) -> None:
        """Start Serve with HTTP on ``http_port`` and gRPC on ``grpc_port``."""
        self.command(
            "serve", "start", "--http-host=127.0.0.1", f"--http-port={self.http_port}",
            f"--address=127.0.0.1:{self.gcs_port}", f"--grpc-port={self.grpc_port}",
            f"--grpc-servicer-functions={GRPC_SERVICES}",
            *(("--proxy-location=HeadOnly",) if self._head_only else ()),
        )  # fmt: skip

    def add_node(self, num_cpus: int = 1, resources: Mapping[str, float] | None = None) -> int:
        """Start one more node of this cluster, on this machine; the pid of its raylet. Whoever
        ends that process and its children has lost the node."""
        before = {process.pid for process in self._raylets()}
        self.command(
            "ray", "start", f"--address=127.0.0.1:{self.gcs_port}", f"--num-cpus={num_cpus}",
            "--node-ip-address=127.0.0.1", f"--resources={json.dumps(dict(resources or {}))}",
            f"--dashboard-agent-listen-port={free_ports(1)[0]}", "--disable-usage-stats",
            without=("RAY_ADDRESS",),
        )  # fmt: skip
        [added] = [process.pid for process in self._raylets() if process.pid not in before]
        return int(added)

    def _raylets(self) -> list[psutil.Process]:
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if process.name() == "raylet":
                    found.append(process)
        return found

    def command(
        self,
        program: str,
        *args: str,
        timeout_s: float = 120,
        without: Sequence[str] = (),
        **kw: Any,
    ) -> str:
        """Run a program of this environment's ``bin`` to its end; its output.

        Raises TwinpathError with the output when it fails. Output goes through a file, since a
        daemon that the program starts would hold a pipe open.
        """
        env = {key: value for key, value in self.env.items() if key not in without}
        log = self.folder / f"{program}-{uuid.uuid4().hex[:8]}.log"
        path = Path(sys.executable).with_name(program)
        with log.open("wb") as sink:
            done = subprocess.run(
                [str(path), *args], env=env, stdout=sink, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, timeout=timeout_s, check=False, **kw,
            )  # fmt: skip
        output = log.read_text(errors="replace")
        if done.returncode:
            raise TwinpathError(
                f"{program} {' '.join(args)} failed with {done.returncode}:\n{output[-4000:]}"
            )
        return output

    def wait_until_ready(self, *paths: str, timeout_s: float = 120) -> None:
        """Wait until applications answer with success at ``paths`` (default: ``/readyz``), some
        times in a row: while HAProxy takes over a new configuration, the process that has the old
        one still accepts connections and answers them 404. Raises TwinpathError."""
        deadline_s = time.monotonic() + timeout_s
        failed, problem, in_a_row = self.url, "too few answers in a row", 0
        while time.monotonic() < deadline_s:
            try:
                for path in paths or ("/readyz",):
                    url = self.url + path
                    urllib.request.urlopen(url, timeout=5).close()
                in_a_row += 1
            except OSError as error:
                failed, problem, in_a_row = url, str(error), 0
            if in_a_row == READY_IN_A_ROW:
                return
            time.sleep(0.1)
        raise TwinpathError(f"{failed} was not ready in {timeout_s:g} s: {problem}")

    def deploy(self, config: Path, timeout_s: float = 120) -> None:
        """``serve deploy`` a config and wait until its applications run. Raises TwinpathError
        with Serve's reason when one fails, or when they do not run within ``timeout_s``."""
        self.command("serve", "deploy", str(config))
        request = urllib.request.Request(
            f"{self.dashboard_url}/api/serve/applications/",
            headers={"Authorization": f"Bearer {self.marker}"},
        )
        deadline_s = time.monotonic() + timeout_s
        while True:
            with urllib.request.urlopen(request, timeout=30) as answer:
                found = json.load(answer)["applications"]
            waiting = {name: app for name, app in found.items() if app["status"] != "RUNNING"}
            failed = {n: app for n, app in waiting.items() if app["status"] == "DEPLOY_FAILED"}
            if found and not waiting:
                return
            if failed or time.monotonic() > deadline_s:
                reasons = [
                    f"{name} is {app['status']}: {app['message']}"
                    for name, app in (failed or waiting).items()
                ] + [
                    f"{name}, {deployment}: {found['message']}"
                    for name, app in (failed or waiting).items()
                    for deployment, found in app["deployments"].items()
                    if found["message"]
                ]
                raise TwinpathError(f"{config} is not served:\n" + "\n".join(reasons))
            time.sleep(0.2)

    def processes(self) -> list[psutil.Process]:
        """Every process of this session and what these have started, this one excepted."""
        found, children = {}, collections.defaultdict(list)
        # `psutil.process_iter` remembers those of its last call, also where another process has
        # their number by now.
        for pid in psutil.pids():
            if pid == os.getpid():
                continue
            with contextlib.suppress(psutil.Error, OSError):
                process = psutil.Process(pid)
                children[process.ppid()].append(process)
                if _carries(process, self._marks):
                    found[process.pid] = process
        # An engine's title may have overwritten all of its marks; its replica has others.
        grown = list(found.values())
        while grown:
            for child in children[grown.pop().pid]:
                if child.pid not in found:
                    found[child.pid] = child
                    grown.append(child)
        return list(found.values())

    def stop(self) -> None:
        """End every process of this session: asked first, then forced. Safe to call twice."""
        # A second Ctrl-C must not leave half of them behind.
        with _uninterrupted():
            running: list[psutil.Process] = []
            for sign, patience_s in ((signal.SIGTERM, self.patience_s), (signal.SIGKILL, 5.0)):
                # Those of before too: nothing leads to them once what started them has ended.
                running = [*{*running, *self.processes()}]
                for process in running:
                    with contextlib.suppress(psutil.Error):
                        process.send_signal(sign)
                psutil.wait_procs(running, timeout=patience_s)
            shutil.rmtree(self.folder, ignore_errors=True)


def _carries(process: psutil.Process, marks: Sequence[str]) -> bool:
    """Whether one of these texts is anywhere in the environment of a process.

    The raw block is searched: a process that changes its title (Ray's and vLLM's do) overwrites
    the start of it with NULs, and psutil reads no further than those. Which variables stand there
    is chance, so that one of them alone would not do.
    """
    raw = Path(f"/proc/{process.pid}/environ")
    if raw.exists():
        found = raw.read_bytes()
        return any(mark.encode() in found for mark in marks)
    return any(mark in value for value in process.environ().values() for mark in marks)


@contextlib.contextmanager
def _uninterrupted() -> Any:
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:  # not in the main thread, which alone gets signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def interrupt_once() -> None:
    """From now on the first SIGINT or SIGTERM raises KeyboardInterrupt, and later ones are
    ignored, so that an impatient second Ctrl-C does not cut the stopping of a session short."""

    def interrupt(signum: int, frame: object) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, interrupt)


def free_ports(count: int) -> list[int]:
    """TCP ports of the loopback that nobody listens on at this moment.

    They lie below those that the kernel gives out (32768 up, Linux's default), as any connection of
    any process may be given one of these before it is listened on.
    """
    found = itertools.islice(
        filter(_is_free, random.SystemRandom().sample(PORTS, len(PORTS))), count
    )
    ports = list(found)
    if len(ports) < count:
        raise TwinpathError(f"fewer than {count} of the ports {PORTS[0]} to {PORTS[-1]} are free")
    return ports


def serve_ports() -> dict[str, str]:
    """Variables that give the replicas of one Serve, and the proxy that waits for them where there
    are none, two hundred HTTP and gRPC ports of their own.

    Replicas of every Serve listen from port 30000 up, that proxy on 8500 and 9500, and share a port
    (SO_REUSEPORT) with those of another Serve on the machine: each would be sent requests that are
    for the other. These lie between the ports of Ray's workers and those that the kernel gives out.
    """
    slices = list(range(22))
    random.SystemRandom().shuffle(slices)
    for number in slices:
        http, grpc = 20_000 + 200 * number, 25_000 + 200 * number
        few = (*range(10), 199)
        if all(_is_free(first + port) for first in (http, grpc) for port in few):
            break
    return {
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(http),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(http + 198),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(http + 199),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(grpc),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(grpc + 198),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(grpc + 199),
    }


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return False
    return True
