"""A Serve that was started without the fast path: all of it works, slowly, and is told so. Its
Python proxies are the ones that HTTP and gRPC come through here."""

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest
import yaml

from online.conftest import HERE, ROOT, application, until
from twinpath.online.gateway.keys import new_key, read_keys, write_keys
from twinpath.online.protocols import oip_pb2 as pb
from twinpath.online.session import ServeSession

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]
BODY = {"rows": [{"x": 2.0}]}


@pytest.fixture(scope="module")
def stock() -> Iterator[tuple[ServeSession, dict[str, str]]]:
    """A session with one guarded graph, and keys by name."""
    paths = [ROOT / "platform", ROOT, HERE]
    with ServeSession(num_cpus=8, pythonpath=paths, fast_path=False) as session:
        keys, records = {}, []
        for name, graph in (("many", "fused"), ("other", "others")):
            keys[name], record = new_key(name, (graph,))
            records.append(record)
        path = session.folder / "keys"
        write_keys(path, records)
        config = session.folder / "app.yaml"
        app = application("fused", gateway={"api_keys": str(path)})
        config.write_text(yaml.safe_dump({"applications": [app]}))
        session.deploy(config)
        session.wait_until_ready("/fused/readyz")
        yield session, keys


def post(session: ServeSession, key: str | None) -> httpx.Response:
    headers = {} if key is None else {"x-api-key": key}
    return httpx.post(f"{session.url}/fused/fused/predict", json=BODY, headers=headers, timeout=60)


def code_of(session: ServeSession, key: str | None, x: float = 2.0) -> tuple[str, str]:
    """The status of an inference over gRPC, and its text."""
    request = pb.ModelInferRequest(model_name="fused")
    request.inputs.add(name="x", datatype="FP64", shape=[1]).contents.fp64_contents.append(x)
    metadata = [("application", "fused"), *([] if key is None else [("x-api-key", key)])]
    with grpc.insecure_channel(f"127.0.0.1:{session.grpc_port}") as channel:
        infer = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelInferResponse.FromString,
        )
        try:
            infer(request, metadata=metadata, timeout=60)
        except grpc.RpcError as error:
            return error.code().name, error.details() or ""
    return "OK", ""


def test_the_replica_says_what_is_missing_and_what_to_do(stock: tuple[ServeSession, dict]):
    session, _ = stock

    def said() -> list[Path]:
        found = []
        for path in session.folder.rglob("replica_*.log"):
            with contextlib.suppress(OSError):
                if 'eval "$(twinpath env)"' in path.read_text(errors="replace"):
                    found.append(path)
        return found

    until(said, 60, "the warning in the replica's log")


def test_the_gateways_refusals_over_http(stock: tuple[ServeSession, dict[str, str]]):
    session, keys = stock
    assert post(session, keys["many"]).json() == {"rows": [{"y": 5.0, "label": "none"}]}
    assert post(session, None).status_code == 401
    assert post(session, keys["other"]).status_code == 403


def test_the_gateways_refusals_through_serves_grpc_proxy(
    stock: tuple[ServeSession, dict[str, str]],
):
    session, keys = stock
    until(lambda: code_of(session, keys["many"])[0] == "OK", 60, "the gRPC proxy knows the way")
    assert code_of(session, None)[0] == "UNAUTHENTICATED"
    assert code_of(session, "tp_no_such")[0] == "UNAUTHENTICATED"
    assert code_of(session, keys["other"])[0] == "PERMISSION_DENIED"
    assert code_of(session, keys["many"], 13.0)[0] == "INVALID_ARGUMENT"


def test_a_limit_counts_http_and_grpc_together(stock: tuple[ServeSession, dict[str, str]]):
    session, _ = stock
    path = session.folder / "keys"
    # A principal of its own, since counts outlive their keys.
    few, record = new_key(f"few {uuid.uuid4()}", ("fused",), quota="2/day")
    write_keys(path, [*(each for each in read_keys(path) if each.quota is None), record])
    until(lambda: post(session, few).status_code == 200, 60, "the new key opens")
    assert code_of(session, few)[0] == "OK"
    code, text = code_of(session, few)
    assert code == "RESOURCE_EXHAUSTED", text
    assert "2/day" in text
    refused = post(session, few)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) > 60
