"""Whatever is refused, over HTTP or gRPC, is in the audit log, with the name of who asked."""

import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from pydantic import BaseModel

from twinpath import Batch, Columns, Graph, Node
from twinpath.errors import TwinpathError
from twinpath.graph.stage import Executor
from twinpath.online.app import GraphApp, graph_app
from twinpath.online.batcher import Batcher
from twinpath.online.gateway.args import GatewayArgs
from twinpath.online.gateway.keys import new_key, write_keys
from twinpath.online.oip_service import OipService
from twinpath.online.protocols import oip_pb2 as pb
from twinpath.online.protocols.openai import OpenAIDoor

LIMIT = 1000
LARGE = b" " * (LIMIT + 1)


class Number(BaseModel):
    x: float


class Double(Node):
    inputs, outputs = {"x": "float64"}, {"x": "float64"}

    def predict(self, columns: Columns) -> Columns:
        return {"x": np.asarray(columns["x"]) * 2}


class Guarded:
    """An app that asks for keys, and what its audit log says in the end."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "audit"
        self.key, mine = new_key("ann")
        self.other, others = new_key("ben", ("letters",))
        write_keys(folder / "keys", [mine, others])
        args = {"api_keys": str(folder / "keys"), "max_rows": 2, "audit_log": str(self._log)}
        graph = Graph("numbers", input=Number, output=Number)
        with graph as number:
            graph.output(Double()(number))
        executor = Executor(graph.plan)
        executor.setup()
        self.app: GraphApp = graph_app(
            graph.plan, Batcher(executor.run, Batch()), max_body_bytes=LIMIT,
            gateway=GatewayArgs.model_validate(args),
        )  # fmt: skip

    def client(self, key: str | None = None) -> httpx.AsyncClient:
        headers = {} if key is None else {"x-api-key": key}
        transport = httpx.ASGITransport(self.app)
        return httpx.AsyncClient(transport=transport, base_url="http://x", headers=headers)

    def lines(self) -> list[dict[str, Any]]:
        self.app.frontend.gate.close()  # type: ignore[union-attr]
        return [json.loads(line) for line in self._log.read_text().splitlines()]


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Guarded]:
    served = Guarded(tmp_path)
    yield served
    served.app.frontend.gate.close()  # type: ignore[union-attr]


async def pieces() -> AsyncIterator[bytes]:
    for _ in range(5):
        yield LARGE[:400]


@pytest.mark.parametrize("content", [lambda: LARGE, pieces], ids=["declared", "chunked"])
@pytest.mark.parametrize(
    "path",
    ["/predict", "/v2/models/numbers/infer", "/v1/models/numbers:predict", "/invocations",
     "/v1/completions"],
)  # fmt: skip
async def test_a_body_over_the_limit_is_in_the_log_with_who_sent_it(
    guarded: Guarded, path: str, content: Callable[[], Any]
):
    async def engine(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    guarded.app.openai = OpenAIDoor(engine, guarded.app.frontend)
    async with guarded.client(guarded.key) as client:
        answer = await client.post(path, content=content(), headers={"x-request-id": "mine"})
    assert answer.status_code == 413
    assert answer.headers["x-request-id"] == "mine"
    async with guarded.client() as stranger:
        assert (await stranger.post(path, content=content())).status_code == 401
    told, second = guarded.lines()
    assert (told["status"], told["code"], told["principal"]) == (413, "body_too_large", "ann")
    assert (told["request_id"], told["path"]) == ("mine", path)
    assert told["body_bytes"] == (len(LARGE) if content is not pieces else 0)
    assert (second["status"], second["principal"]) == (401, None)


async def test_every_refusal_is_in_the_log(guarded: Guarded):
    row = {"x": 1.0}
    cases: list[tuple[str | None, str, dict[str, Any], int]] = [
        (None, "/predict", {"json": {"rows": [row]}}, 401),
        (guarded.other, "/predict", {"json": {"rows": [row]}}, 403),
        (guarded.key, "/predict", {"json": {"rows": [row] * 3}}, 413),
        (guarded.key, "/predict", {"content": b"{"}, 400),
        (guarded.key, "/predict", {"content": b"x", "headers": {"content-type": "text/a"}}, 415),
        (guarded.key, "/predict", {"json": {"rows": [{"x": "one"}]}}, 422),
        (guarded.key, "/nowhere", {}, 404),
        (guarded.key, "/docs", {}, 405),
        (guarded.key, "/v2/models/letters/infer", {}, 404),
        (guarded.key, "/v1/models/numbers:guess", {}, 404),
    ]
    for key, path, given, status in cases:
        async with guarded.client(key) as client:
            assert (await client.post(path, **given)).status_code == status, path
    told = [(line["path"], line["status"]) for line in guarded.lines()]
    assert told == [(path, status) for _, path, _, status in cases]


async def test_every_refused_call_is_in_the_log(guarded: Guarded):
    service = OipService(guarded.app.frontend)

    async def refused(method: str, message: Any, key: str | None) -> int:
        metadata = () if key is None else (("x-api-key", key),)
        asked = service.ask(method, metadata, "ipv4:10.0.0.1:1", None, message.ByteSize())
        infers = method == "ModelInfer"
        call = service.infer(message, asked) if infers else service.other(method, message, asked)
        with pytest.raises(TwinpathError) as error:
            await call
        return error.value.http_status

    large = pb.ModelInferRequest(model_name="numbers")
    large.raw_input_contents.append(LARGE)
    unload = pb.RepositoryModelUnloadRequest(model_name="numbers")
    cases: list[tuple[str, Any, str | None, int]] = [
        ("ModelInfer", large, guarded.key, 413),
        ("ModelInfer", large, None, 401),
        ("ModelInfer", pb.ModelInferRequest(model_name="letters"), guarded.key, 404),
        ("RepositoryModelUnload", unload, None, 401),
        ("ModelMetadata", pb.ModelMetadataRequest(name="letters"), guarded.key, 404),
    ]
    for method, message, key, status in cases:
        assert await refused(method, message, key) == status, method
    found = guarded.lines()
    told = [(line["path"].rpartition("/")[2], line["status"]) for line in found]
    assert told == [(method, status) for method, _, _, status in cases]
    assert [line["principal"] for line in found] == ["ann", None, "ann", None, "ann"]
    assert found[0]["body_bytes"] == large.ByteSize()
