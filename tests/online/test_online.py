"""The online runtime on a real Serve: the same answers as in process, and honest errors."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import httpx
import numpy as np
import pytest

import online.graphs_for_tests as graphs
from online.conftest import Served, until
from twinpath.online.protocols import oip_pb2 as pb

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(240)]


def predict(client: httpx.Client, graph: str, *values: float) -> httpx.Response:
    return client.post(f"/{graph}/predict", json={"rows": [{"x": value} for value in values]})


@pytest.mark.parametrize("app", ["fused", "branched", "placed"])
def test_served_answers_are_those_of_the_graph_in_process(served: Served, app: str):
    graph = graphs.branched if app == "branched" else graphs.fused
    values = np.random.default_rng(7).uniform(-5, 12, 300).tolist()
    rows = [{"x": value, "label": f"row {i}"} for i, value in enumerate(values)]
    with served.client(app) as client:
        answer = client.post(f"/{graph.name}/predict", json={"rows": rows})
    assert answer.status_code == 200, answer.text
    assert answer.json()["rows"] == graph.run(rows).rows()
    assert len({row["y"] > 20 for row in answer.json()["rows"]}) == 2, "both branches had rows"


def test_a_node_gets_replicas_of_its_own_by_its_name_in_the_config(served: Served):
    assert set(served.application("fused")["deployments"]) == {"fused"}
    assert set(served.application("placed")["deployments"]) == {"fused", "double"}


@pytest.mark.parametrize("app", ["fused", "placed"])
def test_a_poison_row_fails_alone_among_concurrent_clients(served: Served, app: str):
    with served.client(app) as client, ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda x: predict(client, "fused", x), range(40)))
    for x, answer in enumerate(answers):
        if x == 13:
            assert answer.status_code == 422
            [row] = answer.json()["error"]["rows"]
            assert (row["row"], row["node"], row["code"]) == (0, "double", "row_failed")
        else:
            assert answer.json() == {"rows": [{"y": 2.0 * x + 1, "label": "none"}]}


def test_a_poison_row_behind_a_placed_node_is_null_in_a_partial_answer(served: Served):
    rows = [{"x": x} for x in (1, 13, 3)]
    with served.client("placed") as client:
        answer = client.post("/predict?on_error=partial", json={"rows": rows})
    assert [row and row["y"] for row in answer.json()["rows"]] == [3.0, None, 7.0]


@pytest.mark.parametrize(
    ("method", "path", "body", "kind", "status", "code"),
    [
        ("POST", "/predict", b"", "application/json", 400, "empty_body"),
        ("POST", "/predict", b"{", "application/json", 400, "malformed_body"),
        ("POST", "/predict", b'{"rows":[{"x":NaN}]}', "application/json", 400, "malformed_body"),
        ("POST", "/predict", b'{"rows":[{"y":1}]}', "application/json", 422, "invalid_input"),
        ("POST", "/predict", b"x", "text/plain", 415, "unsupported_media_type"),
        ("POST", "/predict", b" " * 10_000_000, "application/json", 413, "body_too_large"),
        ("POST", "/nothing", b"{}", "application/json", 404, "not_found"),
        ("PUT", "/predict", b"{}", "application/json", 405, "method_not_allowed"),
    ],
)
def test_bad_requests_are_refused_clearly_through_the_proxy(
    served: Served, method: str, path: str, body: bytes, kind: str, status: int, code: str
):
    with served.client("fused") as client:
        headers = {"content-type": kind, "x-request-id": "mine"}
        answer = client.request(method, path, content=body, headers=headers)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["code"] == code
    assert answer.json()["error"]["message"]
    assert answer.headers.get_list("x-request-id") == ["mine"]


def test_a_node_that_breaks_its_contract_is_named(served: Served):
    with served.client("broken") as client:
        answer = predict(client, "broken", 1, 2)
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "node_contract"
    assert "'too_few'" in answer.json()["error"]["message"]


def test_the_api_page_and_the_probes_work_below_the_prefix(served: Served):
    with served.client("fused") as client:
        for path in ("/docs", "/docs/swagger-ui-bundle.js", "/healthz", "/readyz"):
            assert client.get(path).status_code == 200, path
        document = client.get("/openapi.json").json()
        assert document["servers"] == [{"url": "/fused"}]


def test_a_client_that_hangs_up_does_not_take_its_batch_with_it(served: Served):
    answers: list[httpx.Response] = []
    with served.client("shared") as client:

        def impatient() -> None:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/predict", json={"rows": [{"x": 1}]}, timeout=0.7)

        hanging_up = threading.Thread(target=impatient)
        hanging_up.start()
        time.sleep(0.1)  # the other came first, and both travel together after 0.3 s
        answers.append(predict(client, "shared", 2))
        hanging_up.join()
    assert answers[0].status_code == 200, answers[0].text
    assert answers[0].json()["rows"][0]["y"] == 2.0


def test_a_deployment_that_ends_answers_what_it_has_accepted(served: Served):
    # The two requests travel together, for 1.3 s: long enough for the replica to be told to stop.
    everything = served.applications
    with served.client("shared") as client, ThreadPoolExecutor(2) as pool:
        load = [pool.submit(predict, client, "shared", x) for x in (1, 2)]
        time.sleep(0.2)
        served.deploy([app for app in everything if app["name"] != "shared"])
        assert [answer.result().status_code for answer in load] == [200, 200]
    until(lambda: not served.application("shared"), 60, "the application is gone")
    served.deploy(everything)
    served.session.wait_until_ready("/shared/readyz")


def test_requests_are_counted_by_serve(served: Served):
    """They pass Serve's wrapper by, but not its metrics."""
    with served.client("fused") as client:
        for x in range(20):
            assert predict(client, "fused", x + 20).status_code == 200
    until(lambda: served.counted("fused", "/fused/fused/predict") >= 20, 60, "20 requests counted")
    metadata = pb.ModelMetadataRequest(name="fused").SerializeToString()
    with grpc.insecure_channel(f"127.0.0.1:{served.session.grpc_port}") as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelMetadata")
        call(metadata, metadata=(("application", "fused"),), timeout=30)
    until(lambda: served.counted("fused", "ModelMetadata") >= 1, 60, "a call is counted")
    labels = ('application="fused"', 'graph="fused"')
    lines = [line for line in served.metrics() if all(label in line for label in labels)]
    for name in ("requests_total", "queue_seconds_count", "batch_rows_bucket", "node_seconds_sum",
                 "decode_seconds_count", "encode_seconds_sum"):  # fmt: skip
        assert any(line.startswith(f"ray_twinpath_{name}{{") for line in lines), name


def test_a_burst_scales_a_placed_node_up_and_idleness_scales_it_down(served: Served):
    assert served.replicas("burst", "slow") == 1
    with served.client("burst") as client, ThreadPoolExecutor(32) as pool:
        load = [pool.submit(predict, client, "burst", x) for x in range(240)]
        until(lambda: served.replicas("burst", "slow") == 3, 40, "three replicas")
        assert {answer.result().status_code for answer in load} == {200}
    until(lambda: served.replicas("burst", "slow") == 1, 40, "back to one replica")


def test_a_node_sleeps_at_no_replica_and_wakes_for_a_row(served: Served):
    until(lambda: served.replicas("asleep", "rare") == 0, 40, "no replica")
    with served.client("asleep") as client:
        assert client.get("/readyz").status_code == 200, "resting is not a reason to be unready"
        answer = predict(client, "asleep", 4)
        assert answer.json() == {"rows": [{"y": 8.0, "label": "none"}]}, answer.text
    until(lambda: served.replicas("asleep", "rare") == 0, 40, "no replica again")
