"""The admin API: who may use it, what each path asks the controller, and how it refuses."""

import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from pydantic import BaseModel
from shelf import filled

from twinpath import Batch, Columns, Graph, Node
from twinpath.errors import ConfigError, InputError, RegistryError, RolloutError
from twinpath.graph.columns import NOTE
from twinpath.graph.stage import Executor
from twinpath.online.app import GraphApp, graph_app
from twinpath.online.batcher import Batcher
from twinpath.online.gateway.args import GatewayArgs
from twinpath.online.gateway.keys import new_key, write_keys
from twinpath.online.rollouts import admin, webhook
from twinpath.online.rollouts.desk import Desk
from twinpath.online.rollouts.feedback import Feedback
from twinpath.online.rollouts.operations import Operations
from twinpath.online.rollouts.reporter import Reporter
from twinpath.rollout.recorder import Recorder
from twinpath.rollout.sketch import Report


class Number(BaseModel):
    x: float


class Noted(Node):
    inputs, outputs = {"x": "float64"}, {"x": "float64"}

    def predict(self, columns: Columns) -> Columns:
        x = np.asarray(columns["x"])
        versions = np.full(len(x), "1", object)
        return {"x": x, NOTE + "version": versions, NOTE + "score": x / 10}


class Controller:
    """Stands for the controller: takes down what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.answer: dict[str, Any] = {"fine": True}

    async def ask(self, operation: str, arguments: dict[str, Any]) -> dict[str, Any]:
        self.asked.append((operation, arguments))
        return self.answer


def app_with(
    controller: Controller,
    store: Feedback,
    gateway: GatewayArgs | None,
    webhook_secret: Path | None = None,
) -> GraphApp:
    graph = Graph("numbers", input=Number, output=Number)
    with graph as number:
        graph.output(Noted()(number, name="model"))
    executor = Executor(graph.plan)
    executor.setup()

    async def join(
        request_id: bytes, labels: list[float | None], principal: str | None
    ) -> dict[str, Any] | None:
        found = store.join(request_id, labels, principal)
        return None if found is None else {"joined": sum(len(r.labels) for r in found.rows)}

    app = graph_app(
        graph.plan, Batcher(executor.run, Batch()), max_body_bytes=1000, gateway=gateway,
        more_routes=admin.routes(controller.ask, join, webhook_secret),
    )  # fmt: skip
    app.frontend.remember = store.remember
    return app


@pytest.fixture
def controller() -> Controller:
    return Controller()


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, str]:
    pairs = {"ann": new_key("ann"), "ben": new_key("ben"), "root": new_key("root", admin=True)}
    write_keys(tmp_path / "keys", [record for _, record in pairs.values()])
    return {name: key for name, (key, _) in pairs.items()}


@pytest.fixture
def client(controller: Controller, keys: dict[str, str], tmp_path: Path) -> httpx.AsyncClient:
    app = app_with(controller, Feedback(), GatewayArgs(api_keys=tmp_path / "keys"))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x")


PATHS = [
    ("GET", "/admin/models", "models"),
    ("GET", "/admin/models/delay", "show"),
    ("POST", "/admin/models/delay/promote", "model_promote"),
    ("POST", "/admin/models/delay/pin", "model_pin"),
    ("POST", "/admin/models/delay/rollback", "model_rollback"),
    ("GET", "/admin/rollouts", "rollouts"),
    ("GET", "/admin/rollouts/delay", "status"),
    ("GET", "/admin/rollouts/delay/history", "history"),
    ("POST", "/admin/rollouts/delay", "start"),
    ("POST", "/admin/rollouts/delay/pause", "pause"),
    ("POST", "/admin/rollouts/delay/resume", "resume"),
    ("POST", "/admin/rollouts/delay/promote", "promote"),
    ("POST", "/admin/rollouts/delay/abort", "abort"),
    ("POST", "/admin/rollouts/delay/rollback", "rollback"),
]


@pytest.mark.parametrize(("method", "path", "operation"), PATHS)
async def test_every_path_is_for_admins_and_asks_for_its_operation(
    client: httpx.AsyncClient, keys: dict[str, str], controller: Controller,
    method: str, path: str, operation: str,
):  # fmt: skip
    body = {"json": {"version": "2", "challenger": "2"}} if method == "POST" else {}

    async def asked(**headers: str) -> int:
        return (await client.request(method, path, headers=headers, **body)).status_code

    assert await asked() == 401
    assert await asked(**{"x-api-key": keys["ann"]}) == 403
    assert controller.asked == []
    assert await asked(**{"x-api-key": keys["root"]}) in (200, 201)
    [(found, arguments)] = controller.asked
    assert found == operation
    if "delay" in path:
        assert (arguments["model"], arguments["by"]) == ("delay", "root")


async def test_without_a_gateway_that_knows_callers_nobody_is_an_admin(controller: Controller):
    for gateway in (None, GatewayArgs()):
        app = app_with(controller, Feedback(), gateway)
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://x"
        ) as client:
            answer = await client.get("/admin/rollouts")
            assert answer.status_code == 401
            assert "twinpath keys new" in answer.json()["error"]["message"]
    assert controller.asked == []


@pytest.mark.parametrize(
    ("error", "status"), [(RolloutError("no"), 409), (RegistryError("away"), 503)]
)
async def test_what_the_controller_refuses_is_refused_with_its_reason(
    client: httpx.AsyncClient, keys: dict[str, str], controller: Controller,
    error: Any, status: int,
):  # fmt: skip
    controller.answer = {"error": {"code": error.code, "message": error.message}}
    answer = await client.get("/admin/rollouts/delay", headers={"x-api-key": keys["root"]})
    assert (answer.status_code, answer.json()["error"]["message"]) == (status, error.message)
    assert ("retry-after" in answer.headers) is (status == 503)


@pytest.mark.parametrize(
    ("path", "text", "status"),
    [
        ("/admin/rollouts/delay", "{", 400),
        ("/admin/rollouts/delay", "[]", 400),
        ("/admin/rollouts/delay", "", 400),
        ("/admin/rollouts/delay/explode", "{}", 422),
        ("/admin/models/delay/explode", "{}", 422),
        ("/feedback", "[1]", 400),
        ("/feedback", '{"labels": [1]}', 422),
        ("/feedback", '{"request_id": "a", "labels": 1}', 422),
        ("/feedback", '{"request_id": "a", "labels": [2]}', 422),
        ("/feedback", '{"request_id": "a", "labels": ["x"]}', 422),
        ("/feedback", '{"request_id": "a", "labels": [1]}', 404),
    ],
)
async def test_a_body_that_does_not_fit_is_refused(
    client: httpx.AsyncClient, keys: dict[str, str], controller: Controller,
    path: str, text: str, status: int,
):  # fmt: skip
    answer = await client.post(path, content=text, headers={"x-api-key": keys["root"]})
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]
    assert controller.asked == []


async def test_feedback_finds_requests_of_any_protocol_and_of_its_caller(
    client: httpx.AsyncClient, keys: dict[str, str]
):
    oip = {"inputs": [{"name": "x", "datatype": "FP64", "shape": [2], "data": [2.0, 3.0]}]}
    bodies = {
        "/predict": {"rows": [{"x": 2}, {"x": 3}]},
        "/v2/models/numbers/infer": oip,
        "/v1/models/numbers:predict": {"instances": [{"x": 2}, {"x": 3}]},
        "/invocations": {"dataframe_records": [{"x": 2}, {"x": 3}]},
    }
    for number, (path, body) in enumerate(bodies.items()):
        mine = {"x-api-key": keys["ann"], "x-request-id": f"r{number}"}
        assert (await client.post(path, json=body, headers=mine)).status_code == 200
        given = {"request_id": f"r{number}", "labels": [1, None]}
        other = await client.post("/feedback", json=given, headers={"x-api-key": keys["ben"]})
        assert (other.status_code, other.json()["error"]["code"]) == (404, "unknown_request")
        answer = await client.post("/feedback", json=given, headers=mine)
        assert answer.json() == {"joined": 1}, path


def test_models_are_promoted_kept_live_and_rolled_back_but_not_during_a_rollout():
    shelf = filled()
    operate = Operations(Desk(shelf)).run
    shown = operate("model_promote", {"model": "delay", "version": "2"})
    assert (shown["aliases"], shown["previous"]) == ({"champion": "2"}, "1")
    assert operate("model_rollback", {"model": "delay"})["aliases"] == {"champion": "1"}
    assert operate("model_rollback", {"model": "delay"})["aliases"] == {"champion": "2"}
    assert operate("model_pin", {"model": "delay", "version": "3"})["live"] == ["3"]
    again = operate("model_pin", {"model": "delay", "version": "3", "keep": False})
    assert again["live"] == []
    shelf.version_tags["3"]["twinpath.refused"] = "signature"
    with pytest.raises(RolloutError, match="was refused: signature"):
        operate("model_promote", {"model": "delay", "version": "3"})
    with pytest.raises(InputError, match="'new'"):
        operate("model_promote", {"model": "delay", "version": "new"})
    operate("start", {"model": "delay", "rollout": {"challenger": "1"}})
    for operation in ("model_promote", "model_rollback"):
        with pytest.raises(RolloutError, match="under way"):
            operate(operation, {"model": "delay", "version": "1"})


class Counting:
    """A registry node, as far as a reporter knows it."""

    commands = ("drain_reports",)

    def __init__(self) -> None:
        self.recorder = Recorder()

    def status(self) -> dict[str, Any]:
        return {"serving": "1"}

    def drain_reports(self) -> Report:
        return self.recorder.drain()


async def test_what_could_not_be_told_is_told_the_next_time_added_up():
    node, told, up = Counting(), [], True

    async def tell(*given: Any) -> int:
        if not up:
            raise ConnectionError("nobody there")
        told.append(given)
        return 1

    store = Feedback()
    reporter = Reporter({"model": node, "other": object()}, tell, "r")
    expected = 0
    for second in range(6):
        up = second not in (1, 2, 3)
        node.recorder.record("1", np.full(10, 0.5), {}, 0.001)
        expected += 10
        if second == 2:
            from test_feedback import ask, outcome

            store.remember(ask("a"), outcome([0.5], ["1"]))
            join = store.join(b"a", [1.0])
            assert join is not None
            reporter.label(join.rows[0])
        await reporter.once()
    reports = [Report.from_json(text) for _, _, _, text, _ in told]
    assert sum(report.versions["1"].overall.rows for report in reports) == expected
    assert [labels for *_, labels in told if labels] == [[[["1"], [0.5], [1.0]]]]
    assert reporter.waiting_labels == 0


async def test_a_node_asks_its_registry_once_the_controller_has_heard_of_a_change():
    class Watching(Counting):
        asked = 0

        def ask_now(self) -> None:
            self.asked += 1

    node, changes = Watching(), [7, 7, 8, 8, 3]

    async def tell(*_: Any) -> int:
        return changes.pop(0)

    reporter = Reporter({"model": node}, tell, "r")
    asked = []
    while changes:
        await reporter.once()
        asked.append(node.asked)
    assert asked == [0, 0, 1, 1, 2]


def signed(body: bytes, secret: str = "hush", age_s: int = 0) -> dict[str, str]:
    """Headers as MLflow makes them."""
    from mlflow.webhooks.delivery import _generate_hmac_signature

    stamp = str(int(time.time()) - age_s)
    signature = _generate_hmac_signature(secret, "id-1", stamp, body.decode())
    return {webhook.DELIVERY: "id-1", webhook.TIMESTAMP: stamp, webhook.SIGNATURE: signature}


async def test_a_webhook_is_known_by_its_signature_and_needs_no_key(
    controller: Controller, keys: dict[str, str], tmp_path: Path
):
    secret = tmp_path / "secret"
    secret.write_text("hush\n")
    gateway = GatewayArgs(api_keys=tmp_path / "keys")
    app = app_with(controller, Feedback(), gateway, secret)
    body = b'{"entity":"model_version_alias","action":"created","data":{"name":"delay"}}'
    prompt = b'{"entity":"prompt","action":"created","data":{}}'
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:

        async def sent(headers: dict[str, str], body: bytes = body) -> httpx.Response:
            return await client.post(webhook.PATH, content=body, headers=headers)

        for headers in (
            {},
            {webhook.SIGNATURE: "v1,?"},
            signed(body, "other"),
            signed(body + b" "),
            signed(body) | {webhook.TIMESTAMP: "1"},
            signed(body, age_s=301),
        ):
            refused = await sent(headers)
            assert refused.status_code == 401, headers
            assert "x-mlflow-" in refused.json()["error"]["message"]
        assert controller.asked == []
        assert (await sent(signed(body))).status_code == 200
        assert (await sent(signed(prompt), prompt)).json() == {"changed": None}
        assert controller.asked == [("changed", {"model": "delay"})]
        secret.write_text("new")
        assert (await sent(signed(body))).status_code == 401
        assert (await sent(signed(body, "new"))).status_code == 200


@pytest.mark.parametrize("text", [None, "\n"])
def test_a_webhook_without_a_secret_is_refused_at_the_start(
    controller: Controller, tmp_path: Path, text: str | None
):
    secret = tmp_path / "secret"
    if text is not None:
        secret.write_text(text)
    with pytest.raises(ConfigError, match="webhook_secret_file"):
        app_with(controller, Feedback(), None, secret)
