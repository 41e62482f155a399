"""A real ``mlflow server`` that can be stopped and started again on its port."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from twinpath.online.session import free_ports


class MlflowServer:
    """``mlflow server`` on a SQLite file below ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_ports(1)[0]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, if it does not run, and wait until it answers."""
        if self._process is not None and self._process.poll() is None:
            return
        # Its runner of background jobs is eight processes that nothing here needs.
        env = os.environ | {
            "DO_NOT_TRACK": "1",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            # Webhooks go to HTTPS on public addresses only, unless this is set.
            "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https",
            "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
            "MLFLOW_WEBHOOK_CACHE_TTL": "1",
        }
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1",
                    "--port", str(self.port), "--workers", "1",
                    "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db",
                    "--artifacts-destination", str(self.folder / "artifacts"),
                ],
                stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                start_new_session=True, cwd=self.folder, env=env,
            )  # fmt: skip
        deadline_s = time.monotonic() + 300
        while not self._answers():
            ended = self._process.poll()
            text = (self.folder / "server.log").read_text(errors="replace")[-3000:]
            assert ended is None, f"mlflow server ended with {ended}: {text}"
            assert time.monotonic() < deadline_s, f"mlflow server does not answer: {text}"
            time.sleep(0.2)

    def stop(self) -> None:
        """Kill it and its workers; whoever asks it then is refused."""
        if self._process is None:
            return
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None
        deadline_s = time.monotonic() + 30
        while self._answers():
            assert time.monotonic() < deadline_s, "a killed mlflow server goes on answering"
            time.sleep(0.1)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False
