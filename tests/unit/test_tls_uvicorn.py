"""A graph on uvicorn with certificates, as who does without Serve may run it: TLS, and mutual TLS.

Its HTTP protocol is the one that replicas use.
"""

import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from twinpath import Batch, Columns, Graph, Node
from twinpath.graph.stage import Executor
from twinpath.online.app import graph_app
from twinpath.online.batcher import Batcher
from twinpath.online.exchange import Codec, Request
from twinpath.online.gateway.args import GatewayArgs
from twinpath.online.gateway.tls import make_certificates
from twinpath.online.lean import LeanCycle, LeanProtocol
from twinpath.online.slow_bodies import SlowBodies

ORIGIN = "https://me.example"


class Number(BaseModel):
    x: float


class Double(Node):
    inputs, outputs = {"x": "float64"}, {"x": "float64"}

    def predict(self, columns: Columns) -> Columns:
        return {"x": columns["x"] * 2}


class App:
    """A graph's app with a door for predictions; it knows how many came through that."""

    def __init__(self) -> None:
        graph = Graph("numbers", input=Number, output=Number)
        with graph as number:
            graph.output(Double()(number))
        executor = Executor(graph.plan)
        executor.setup()
        given = GatewayArgs.model_validate({"cors": {"allow_origins": [ORIGIN]}})
        batcher = Batcher(executor.run, Batch())
        self._app = graph_app(graph.plan, batcher, max_body_bytes=1000, gateway=given)
        self.max_body_bytes, self.body_timeout_s = 1000, 60.0
        self.slow_bodies = SlowBodies(self)
        self.door, self.entered = self, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    def codec(self, url: bytes, headers: dict[bytes, bytes]) -> Codec | None:
        return None if b"origin" in headers else self._app.frontend.codec(url.decode())

    def enter(self, cycle: LeanCycle) -> None:
        self.entered += 1
        frontend = self._app.frontend
        ask = frontend.ask("/predict", cycle.headers, len(cycle.body), "")
        request = Request("/predict", b"", cycle.headers, bytes(cycle.body))
        frontend.begin(cycle.codec, request, ask, cycle.reply)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    make_certificates(folder, ["localhost", "127.0.0.1"])
    return folder


@pytest.fixture(params=[False, True], ids=["tls", "mtls"])
def served(request: pytest.FixtureRequest, certificates: Path) -> Iterator[tuple[str, bool, App]]:
    app, mutual = App(), bool(request.param)
    config = uvicorn.Config(
        app, port=0, log_level="critical", http=LeanProtocol, lifespan="off",
        ssl_certfile=certificates / "server.pem", ssl_keyfile=certificates / "server-key.pem",
        ssl_ca_certs=str(certificates / "ca.pem") if mutual else None,
        ssl_cert_reqs=ssl.CERT_REQUIRED if mutual else ssl.CERT_NONE,
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    end_s = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < end_s
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"https://localhost:{port}", mutual, app
    finally:
        server.should_exit = True
        thread.join(timeout=30)


def test_only_who_trusts_and_is_trusted_is_answered(
    served: tuple[str, bool, App], certificates: Path
):
    url, mutual, app = served
    body = {"rows": [{"x": 2}]}
    with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
        httpx.post(f"{url}/predict", json=body)
    with pytest.raises(httpx.HTTPError):
        httpx.post(f"{url}/predict".replace("https", "http"), json=body)
    trusting = ssl.create_default_context(cafile=certificates / "ca.pem")
    if mutual:
        with pytest.raises(httpx.HTTPError):
            httpx.post(f"{url}/predict", json=body, verify=trusting)
        trusting.load_cert_chain(certificates / "client.pem", certificates / "client-key.pem")
    assert app.entered == 0
    with httpx.Client(base_url=url, verify=trusting) as client:
        for _ in range(3):  # on one connection
            assert client.post("/predict", json=body).json() == {"rows": [{"x": 4.0}]}
        assert app.entered == 3
        large = client.post("/predict", content=b" " * 300_000)
        assert large.status_code == 413
        preflight = client.options(
            "/predict", headers={"origin": ORIGIN, "access-control-request-method": "POST"}
        )
        assert preflight.headers["access-control-allow-origin"] == ORIGIN
        answer = client.post("/predict", json=body, headers={"origin": ORIGIN})
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert client.get("/readyz").status_code == 200
