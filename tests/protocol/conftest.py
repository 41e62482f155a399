"""Served graphs, and each client in its own environment."""

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from twinpath.online.session import ServeSession

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
HOMES = ROOT / ".clients"
CLIENTS = ("tritonclient", "kserve", "mlserver")


@pytest.fixture(scope="package")
def environment() -> Iterator[Callable[[str], Path]]:
    """The interpreter of a client's environment. All are made while the session starts, from their
    pins when these are new."""
    with ThreadPoolExecutor(1) as one:
        begun = {client: one.submit(_made, client) for client in CLIENTS}

        def made(client: str) -> Path:
            try:
                return begun[client].result()
            except AssertionError:  # the registry may answer by now
                return _made(client)

        yield made


def _made(client: str) -> Path:
    pins = ROOT / "requirements" / "clients" / f"{client}.txt"
    home = HOMES / client
    stamp = home / "pins.sha256"
    wanted = hashlib.sha256(pins.read_bytes()).hexdigest()
    python = home / "bin" / "python"
    if not stamp.exists() or stamp.read_text() != wanted:
        venv = [sys.executable, "-m", "venv", "--clear", "--without-pip", str(home)]
        # Our pip, and without compiling: few of these modules are ever imported.
        pip = [
            sys.executable, "-m", "pip", "--python", str(python), "install", "-q",
            "--no-deps", "--no-compile", "-r", str(pins),
        ]  # fmt: skip
        for command in (venv, pip):
            done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
            assert done.returncode == 0, done.stderr[-4000:]
        stamp.write_text(wanted)
    return python


@pytest.fixture(scope="package")
def session() -> Iterator[ServeSession]:
    applications = [
        {
            "name": name,
            "route_prefix": f"/{name}",
            "import_path": f"tests.protocol.graphs_for_tests:{name}_app",
        }
        for name in ("wide", "halves", "scores")
    ]
    with ServeSession(num_cpus=8, pythonpath=[ROOT / "platform", ROOT]) as running:
        config = running.folder / "config.yaml"
        config.write_text(yaml.safe_dump({"applications": applications}))
        running.deploy(config)
        for application in applications:
            until_reached_by_grpc(running.grpc_port, application["name"])
        yield running


def until_reached_by_grpc(port: int, application: str) -> None:
    """Wait until HAProxy knows the replica: before, Serve's own proxy answers, which knows no
    health service."""
    asked = health_pb2.HealthCheckRequest(service="")
    metadata = (("application", application),)
    end_s = time.monotonic() + 60
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        while True:
            try:
                health_pb2_grpc.HealthStub(channel).Check(asked, metadata=metadata, timeout=10)
            except grpc.RpcError:
                if time.monotonic() > end_s:
                    raise
                time.sleep(0.05)
            else:
                return


@pytest.fixture
def run_client(
    environment: Callable[[str], Path], session: ServeSession
) -> Callable[[str, str], str]:
    """Run a script of ``clients/`` in a client's environment; what it printed."""

    def run(client: str, script: str) -> str:
        done = subprocess.run(
            [
                str(environment(client)), str(HERE / "clients" / script),
                f"127.0.0.1:{session.http_port}", f"127.0.0.1:{session.grpc_port}",
            ],
            capture_output=True, text=True, timeout=120, check=False,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run
