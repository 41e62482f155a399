"""The small feature repository, on SQLite and on a real redis-server."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.features.shop import make_repo

os.environ.setdefault("FEAST_USAGE", "False")


@dataclass
class Redis:
    """A redis-server of our own that can be killed and started again on the same port."""

    folder: Path
    options: tuple[str, ...] = ()
    port: int = 0
    process: subprocess.Popen | None = None
    address: str = field(init=False, default="")

    def start(self) -> None:
        command = shutil.which("redis-server")
        assert command, "these tests need redis-server: apt-get install redis-server"
        if not self.port:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self.port = free.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        log = (self.folder / "redis.log").open("ab")
        self.process = subprocess.Popen(
            [command, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder),
             "--appendonly", "yes", "--appendfsync", "always", "--save", "", *self.options],
            stdout=log, stderr=log,
        )  # fmt: skip
        end_s = time.monotonic() + 60
        while not self.answers():
            assert self.process.poll() is None, (self.folder / "redis.log").read_text()
            assert time.monotonic() < end_s, "redis-server did not come up"
            time.sleep(0.02)

    def answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as client:
                client.sendall(b"PING\r\n")
                return client.recv(16).startswith(b"+PONG")
        except OSError:
            return False

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture(scope="session")
def redis(tmp_path_factory) -> Iterator[Redis]:
    server = Redis(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def sqlite_repo(tmp_path_factory) -> Path:
    return make_repo(tmp_path_factory.mktemp("sqlite") / "repo", "{type: sqlite, path: online.db}")


@pytest.fixture(scope="session")
def redis_repo(tmp_path_factory, redis) -> Path:
    return make_repo(
        tmp_path_factory.mktemp("repo") / "repo",
        f'{{type: redis, connection_string: "{redis.address}"}}',
    )
