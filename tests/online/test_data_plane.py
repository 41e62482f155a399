"""The data plane on a real Serve, behind HAProxy: overload, deadlines, gateway."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import grpc
import httpx
import pytest

from online.conftest import Served, until
from twinpath.online.gateway.keys import new_key, read_keys, write_keys
from twinpath.online.protocols import oip_pb2 as pb

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(240)]
BODY = {"rows": [{"x": 2.0}]}
OIP = {"inputs": [{"name": "x", "datatype": "FP64", "shape": [1], "data": [2.0]}]}


@pytest.fixture(scope="module")
def tight(served: Served) -> Iterator[httpx.Client]:
    """One client for all threads: to make one takes longer than what is timed here."""
    with served.client("tight") as client:
        yield client


def timed(client: httpx.Client, **headers: str) -> tuple[httpx.Response, float]:
    started_s = time.monotonic()
    answer = client.post("/tight/predict", json=BODY, headers=headers)
    return answer, time.monotonic() - started_s


def rows_run(served: Served, app: str, graph: str) -> int:
    with served.client(app) as client:
        stats = client.get(f"/v2/models/{graph}/stats").json()["model_stats"][0]
    count: int = stats["inference_count"]
    return count


@pytest.mark.parametrize(
    ("path", "body", "wanted"),
    [
        ("/predict", BODY, {"y": 5.0, "label": "none"}),
        ("/v2/models/fused/infer", OIP, 5.0),
        ("/v1/models/fused:predict", {"instances": [{"x": 2.0}]}, {"y": 5.0, "label": "none"}),
        ("/invocations", {"dataframe_records": [{"x": 2.0}]}, {"y": 5.0, "label": "none"}),
    ],
)
def test_every_protocol_answers_the_same(served: Served, path: str, body: Any, wanted: Any):
    with served.client("fused") as client:
        answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    rows = found.get("rows") or found.get("predictions") or found["outputs"][0]["data"]
    assert rows == [wanted]


def test_too_many_are_refused_at_once_and_told_when_to_come_back(tight: httpx.Client):
    timed(tight)  # from then on a slow node is known to be slow, and runs aside
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: timed(tight), range(12)))
    accepted = [answer for answer, _ in answers if answer.status_code == 200]
    refused = [(answer, s) for answer, s in answers if answer.status_code == 503]
    assert len(accepted) + len(refused) == 12
    assert 2 <= len(accepted) <= 5
    slowest_s = max(seconds for answer, seconds in answers if answer.status_code == 200)
    for answer, seconds in refused:
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] == "overloaded"
        assert seconds < slowest_s - 0.3, "a refusal does not wait for the queue"


def test_rows_beyond_their_deadline_are_never_run(served: Served, tight: httpx.Client):
    before = rows_run(served, "tight", "tight")
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(timed, tight)
        time.sleep(0.1)
        late, seconds = timed(tight, **{"x-request-timeout-ms": "100"})
        assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert not running.done(), "as soon as the deadline passes, while another runs"
        assert seconds > 0.09
        assert running.result()[0].status_code == 200
    assert timed(tight)[0].status_code == 200
    assert rows_run(served, "tight", "tight") == before + 2


def test_low_priorities_are_shed_first(tight: httpx.Client):
    with ThreadPoolExecutor(4) as pool:
        running = pool.submit(timed, tight)
        time.sleep(0.1)
        low = [pool.submit(timed, tight, **{"x-request-priority": "low"}) for _ in range(2)]
        time.sleep(0.1)
        high, _ = timed(tight, **{"x-request-priority": "high"})
        assert high.status_code == 200
        assert running.result()[0].status_code == 200
        assert sorted(each.result()[0].status_code for each in low) == [200, 503]


def test_nobody_passes_the_gateway_without_a_key(served: Served):
    with served.client("guarded") as client:
        for path, body in (("/fused/predict", BODY), ("/v2/models/fused/infer", OIP)):
            assert client.post(path, json=body).status_code == 401
            wrong = client.post(path, json=body, headers={"x-api-key": "tp_x_y"})
            assert wrong.status_code == 401
            right = client.post(path, json=body, headers={"x-api-key": served.key})
            assert right.status_code == 200
        assert client.get("/v2/models/fused").status_code == 401
        assert client.get("/readyz").status_code == 200


def test_the_gateway_has_the_same_rules_for_grpc(served: Served):
    request = pb.ModelInferRequest(model_name="fused")
    request.inputs.add(name="x", datatype="FP64", shape=[1]).contents.fp64_contents.append(2.0)
    with grpc.insecure_channel(f"127.0.0.1:{served.session.grpc_port}") as channel:
        infer = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelInferResponse.FromString,
        )
        application = ("application", "guarded")
        with pytest.raises(grpc.RpcError) as refused:
            infer(request, metadata=(application,))
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
        answer = infer(request, metadata=(application, ("x-api-key", served.key)))
        assert answer.model_name == "fused"


def test_keys_rotate_while_it_serves(served: Served):
    path = served.session.folder / "keys"
    records = read_keys(path)
    key, record = new_key("ben", ("fused",))

    def status(given: str) -> int:
        with served.client("guarded") as client:
            headers = {"x-api-key": given}
            return client.post("/fused/predict", json=BODY, headers=headers).status_code

    assert status(key) == 401
    write_keys(path, [*records, record])
    until(lambda: status(key) == 200, 10, "the new key opens")
    write_keys(path, records)
    until(lambda: status(key) == 401, 10, "the key that was taken out does not")
    assert status(served.key) == 200


def audited(served: Served, request_id: str) -> dict[str, Any]:
    """The audit log's line of a request, once it is written."""
    path = served.session.folder / "audit.jsonl"
    until(lambda: path.exists() and request_id in path.read_text(), 20, "the line is written")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    [found] = [line for line in lines if line["request_id"] == request_id]
    return found


def test_the_audit_log_names_who_asked(served: Served):
    with served.client("guarded") as client:
        headers = {"x-api-key": served.key, "x-request-id": "for-the-audit"}
        client.post("/fused/predict", json=BODY, headers=headers)
    line = audited(served, "for-the-audit")
    assert (line["principal"], line["status"], line["rows"]) == ("ann", 200, 1)
    assert served.key not in (served.session.folder / "audit.jsonl").read_text()


def replicas_of(served: Served, app: str) -> list[str]:
    """Where the ingress replicas of an application listen, before HAProxy."""
    first = int(served.session.env["RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT"])
    found = []
    for port in range(first, first + 40):
        url = f"http://127.0.0.1:{port}/{app}"
        with suppress(httpx.HTTPError):
            if httpx.get(f"{url}/readyz", timeout=5).status_code == 200:
                found.append(url)
    return found


def test_a_model_is_unloaded_on_every_replica_and_loaded_again(served: Served):
    until(lambda: len(replicas_of(served, "pair")) == 2, 60, "both replicas listen")
    replicas = replicas_of(served, "pair")
    infer = "/v2/models/fused/infer"

    def statuses(method: str, path: str, body: Any = None) -> list[int]:
        return [httpx.request(method, each + path, json=body).status_code for each in replicas]

    # Each replica in turn is the one that is asked to tell the others.
    for asked in replicas:
        for change, status in (("unload", 503), ("load", 200)):
            path = f"/v2/repository/models/fused/{change}"
            assert httpx.post(asked + path, timeout=60).status_code == 200
            assert statuses("POST", infer, OIP) == [status, status]
            assert statuses("GET", "/v2/models/fused/ready") == [status, status]
            assert statuses("GET", "/readyz") == [status, status]


def test_a_model_is_unloaded_over_grpc_on_every_replica(served: Served):
    until(lambda: len(replicas_of(served, "pair")) == 2, 60, "both replicas listen")
    replicas = replicas_of(served, "pair")
    with grpc.insecure_channel(f"127.0.0.1:{served.session.grpc_port}") as channel:
        for change, status in (("Unload", 503), ("Load", 200)):
            message = getattr(pb, f"RepositoryModel{change}Request")(model_name="fused")
            call = channel.unary_unary(f"/inference.GRPCInferenceService/RepositoryModel{change}")
            metadata = (("application", "pair"),)
            call(message.SerializeToString(), metadata=metadata, timeout=60)
            ready = [httpx.get(f"{each}/readyz").status_code for each in replicas]
            assert ready == [status, status]


def test_browsers_may_ask_from_the_origins_that_are_allowed_and_no_others(served: Served):
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "x-api-key"}
    allowed, other = {"origin": "https://me.example"}, {"origin": "https://eve.example"}
    name = "access-control-allow-origin"
    with served.client("guarded") as client:
        for path in ("/fused/predict", "/v2/models/fused/infer"):
            # A preflight has no credentials.
            preflight = client.options(path, headers=asked | allowed)
            assert (preflight.status_code, preflight.headers[name]) == (200, allowed["origin"])
            assert "x-api-key" in preflight.headers["access-control-allow-headers"].lower()
            refused = client.options(path, headers=asked | other)
            assert (refused.status_code, refused.headers.get(name)) == (400, None)
        key = {"x-api-key": served.key}
        for origin, told in ((allowed, allowed["origin"]), (other, None)):
            answer = client.post("/fused/predict", json=BODY, headers=origin | key)
            assert (answer.status_code, answer.headers.get(name)) == (200, told)
        # A page has to be able to read why it was refused.
        answer = client.post("/fused/predict", json=BODY, headers=allowed)
        assert (answer.status_code, answer.headers.get(name)) == (401, allowed["origin"])


def test_a_body_over_the_limit_is_in_the_audit_log(served: Served):
    headers = {"x-api-key": served.key, "x-request-id": "too-large"}
    with served.client("guarded") as client:
        answer = client.post("/fused/predict", content=b" " * (9 << 20), headers=headers)
    assert answer.status_code == 413
    line = audited(served, "too-large")
    assert (line["principal"], line["status"], line["code"]) == ("ann", 413, "body_too_large")
