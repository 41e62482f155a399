"""``vllm serve`` on the same model, for comparison."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from twinpath.online.session import free_ports


@contextlib.contextmanager
def vllm_serve(
    model: Path, options: Mapping[str, Any], environment: Mapping[str, str], log: Path
) -> Iterator[str]:
    """The URL of a server with these engine options, which is gone afterwards."""
    [port] = free_ports(1)
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            command += [f"--{flag}"] if value else []
        else:
            command += [f"--{flag}", str(value)]
    with log.open("wb") as sink:
        server = subprocess.Popen(
            command,
            env=os.environ | dict(environment),
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(server, url, log)
        yield url
    finally:
        # vLLM's own end of its processes first; what is left of the group afterwards.
        with contextlib.suppress(ProcessLookupError):
            server.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _wait(server: "subprocess.Popen[bytes]", url: str, log: Path, timeout_s: float = 280) -> None:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s and server.poll() is None:
        with (
            contextlib.suppress(urllib.error.URLError, OSError),
            urllib.request.urlopen(f"{url}/health", timeout=5) as answer,
        ):
            if answer.status == 200:
                return
        time.sleep(0.5)
    raise RuntimeError(f"vllm serve is not there:\n{log.read_text(errors='replace')[-3000:]}")
