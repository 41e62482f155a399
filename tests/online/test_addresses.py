"""Where Serve listens, and with what certificate: a Serve that is started anew for each."""

import os
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from online.conftest import HERE, ROOT, application, until
from twinpath.errors import TwinpathError
from twinpath.online.gateway.keys import new_key, write_keys
from twinpath.online.gateway.tls import make_certificates
from twinpath.online.session import ServeSession, free_ports

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]
BODY = {"rows": [{"x": 2.0}]}
ANSWER = {"rows": [{"y": 5.0, "label": "none"}]}


@pytest.fixture(scope="module")
def ray() -> Iterator[ServeSession]:
    with ServeSession(pythonpath=[ROOT / "platform", ROOT, HERE], fast_path=False) as session:
        yield session


@pytest.fixture
def without_serve(ray: ServeSession) -> ServeSession:
    """Ray alone; Serve's options are those that it is started with."""
    ray.command("serve", "shutdown", "-y")
    return ray


@contextmanager
def serve_run(session: ServeSession, config: dict[str, Any]) -> Iterator[Path]:
    """``serve run`` of a config in the background; the file with its output."""
    path, log = session.folder / "run.yaml", session.folder / "run.log"
    path.write_text(yaml.safe_dump(config))
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("serve")), "run", str(path)],
            env=session.env, stdout=sink, stderr=subprocess.STDOUT, cwd=session.folder,
        )  # fmt: skip
    try:
        yield log
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


def test_serves_own_certificate_is_for_http_and_asks_clients_for_none(
    without_serve: ServeSession,
):
    folder = without_serve.folder / "certificates"
    make_certificates(folder, ["localhost"])
    [port] = free_ports(1)
    http = {
        "host": "127.0.0.1", "port": port, "ssl_certfile": str(folder / "server.pem"),
        "ssl_keyfile": str(folder / "server-key.pem"), "ssl_ca_certs": str(folder / "ca.pem"),
    }  # fmt: skip
    config = {"http_options": http, "applications": [application("fused")]}
    trusting = ssl.create_default_context(cafile=folder / "ca.pem")
    url = f"https://localhost:{port}/fused/fused/predict"

    def answered() -> bool:
        try:
            return httpx.post(url, json=BODY, verify=trusting, timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    with serve_run(without_serve, config) as log:
        until(answered, 120, f"an answer over TLS; see {log}: {log.read_text()}")
        # No certificate of its own was asked of the client, as docs/gateway.md says.
        assert httpx.post(url, json=BODY, verify=trusting).json() == ANSWER
        with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
            httpx.post(url, json=BODY)
        with pytest.raises(httpx.HTTPError):
            httpx.post(url.replace("https", "http"), json=BODY)


def test_a_public_address_is_refused_until_callers_have_to_say_who_they_are(
    without_serve: ServeSession,
):
    session = without_serve
    port = f"--http-port={session.http_port}"
    session.command("serve", "start", "--http-host=0.0.0.0", port)
    config = session.folder / "public.yaml"
    config.write_text(yaml.safe_dump({"applications": [application("fused")]}))
    with pytest.raises(TwinpathError, match=r"0\.0\.0\.0 can be reached from other machines"):
        session.deploy(config)
    url = f"{session.url}/fused/fused/predict"
    assert httpx.post(url, json=BODY, timeout=30).status_code != 200

    key, record = new_key("ann", ("fused",))
    write_keys(session.folder / "keys", [record])
    guarded = application("fused", gateway={"api_keys": str(session.folder / "keys")})
    config.write_text(yaml.safe_dump({"applications": [guarded]}))
    session.deploy(config)
    session.wait_until_ready("/fused/readyz")
    assert httpx.post(url, json=BODY, timeout=60).status_code == 401
    answer = httpx.post(url, json=BODY, headers={"x-api-key": key}, timeout=60)
    assert answer.json() == ANSWER
