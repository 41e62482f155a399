"""A real MLflow server and a SQLite file, started once for all of these tests."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("mlflow")

from registered_models import Shelf  # after the check above

from twinpath.online.session import free_ports


class Server:
    """``mlflow server`` on a SQLite file; it can be stopped and started again on its port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_ports(1)[0]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, if it does not run, and wait until it answers."""
        if self._process is not None and self._process.poll() is None:
            return
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1",
                    "--port", str(self.port), "--workers", "1",
                    "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db",
                    "--artifacts-destination", str(self.folder / "artifacts"),
                ],
                stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                start_new_session=True, cwd=self.folder, env=os.environ | {"DO_NOT_TRACK": "1"},
            )  # fmt: skip
        deadline_s = time.monotonic() + 150
        while True:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                    return
            except OSError:
                ended = self._process.poll()
                text = (self.folder / "server.log").read_text(errors="replace")[-3000:]
                assert ended is None, f"mlflow server ended with {ended}: {text}"
                assert time.monotonic() < deadline_s, f"mlflow server does not answer: {text}"
                time.sleep(0.2)

    def stop(self) -> None:
        """End it and its workers."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server, running."""
    made = Server(tmp_path_factory.mktemp("mlflow"))
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="session")
def on_server(server: Server) -> Shelf:
    """The server's registry."""
    return Shelf(server.uri, server.folder)


@pytest.fixture(scope="session")
def on_file(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    """The registry in a SQLite file."""
    folder = tmp_path_factory.mktemp("registry")
    (folder / "artifacts").mkdir()
    return Shelf(f"sqlite:///{folder}/mlflow.db", folder / "artifacts")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test has an artifact cache of its own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("TWINPATH_CACHE", str(folder))
    return folder
