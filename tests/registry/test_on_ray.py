"""RegistryModel on Ray Serve, with a real MLflow server: swaps under load, pins, no registry."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import yaml
from registered_models import Shelf, constant, skops

from twinpath.online.protocols import oip_pb2 as pb
from twinpath.online.session import ServeSession
from twinpath.registry.reference import LIVE_TAG, REFUSED_TAG

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(500)]
HERE = Path(__file__).parent
ROOT = HERE.parent.parent
ROW = {"a": 0.1, "b": 0.2, "c": 0.3}
NAME = "served"


class Served:
    """The graph with version 1 (0.25) serving."""

    def __init__(self, session: ServeSession, shelf: Shelf, folder: Path) -> None:
        self.session, self.shelf, self.folder = session, shelf, folder
        self.http = httpx.Client(base_url=session.url, timeout=60)

    def offer(self, p: float, alias: bool = True) -> str:
        """A version that answers ``p``."""
        files = skops(self.folder / f"v-{time.monotonic_ns()}", constant(p))
        return self.shelf.register(NAME, files, "champion" if alias else None)

    def answer(self, path: str = "/scored/predict", **headers: str) -> dict[str, Any]:
        """One row by the typed endpoint."""
        found = self.http.post(path, json={"rows": [ROW]}, headers=headers)
        assert found.status_code == 200, found.text
        row: dict[str, Any] = found.json()["rows"][0]
        return row

    def until_serves(self, version: str) -> None:
        until(lambda: self.answer()["version"] == version, f"version {version} serves")


def until(condition: Callable[[], Any], what: str, timeout_s: float = 100) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.1)


@pytest.fixture(scope="module")
def served(on_server: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    on_server.register(NAME, skops(folder / "first", constant(0.25)), "champion")
    paths = [ROOT / "platform", ROOT, HERE]
    env = {
        "MLFLOW_TRACKING_URI": on_server.uri,
        "TWINPATH_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    with ServeSession(num_cpus=8, pythonpath=paths, env=env) as session:
        config = session.folder / "app.yaml"
        application = {
            "name": "scored",
            "route_prefix": "/",
            "import_path": "registry_graphs:fused_app",
            "args": {"ingress": {"num_cpus": 0.1}},
        }
        placed = application | {
            "name": "placed",
            "route_prefix": "/placed",
            "args": {"ingress": {"num_cpus": 0.1}, "nodes": {"model": {"num_cpus": 0.1}}},
        }
        (folder / "secret").write_text("hush")
        told = placed | {
            "name": "told",
            "route_prefix": "/told",
            "import_path": "registry_graphs:told_app",
        }
        told["args"] = placed["args"] | {
            "rollouts": {"webhook_secret_file": str(folder / "secret"), "interval_s": 0.5}
        }
        config.write_text(yaml.safe_dump({"applications": [application, placed, told]}))
        session.deploy(config, timeout_s=200)
        session.wait_until_ready("/readyz", "/placed/readyz", "/told/readyz", timeout_s=200)
        made = Served(session, on_server, folder)
        yield made
        made.http.close()


class Load:
    """Requests without a pause from some connections, until it is stopped; what went wrong."""

    def __init__(self, url: str, connections: int = 8) -> None:
        self._url, self._ended = url, threading.Event()
        self.failed: list[str] = []
        self.answered = 0
        self.versions: list[str] = []
        self._threads = [threading.Thread(target=self._ask) for _ in range(connections)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        with httpx.Client(timeout=60) as client:
            while not self._ended.is_set():
                try:
                    found = client.post(self._url, json={"rows": [ROW]})
                    if found.status_code != 200:
                        self.failed.append(found.text[:300])
                    else:
                        self.answered += 1
                        self.versions.append(found.json()["rows"][0]["version"])
                except httpx.HTTPError as error:
                    self.failed.append(repr(error))


def test_versions_are_swapped_under_load_without_a_failed_request(served: Served):
    url = f"{served.session.url}/scored/predict"
    with Load(url) as load:
        until(lambda: load.answered > 50, "there is load")
        wanted = []
        for p in (0.5, 0.75, 0.25):
            wanted.append(served.offer(p))
            served.until_serves(wanted[-1])
            before = load.answered
            until(lambda before=before: load.answered > before + 50, "the load goes on")
    assert load.failed == []
    order = list(dict.fromkeys(load.versions))
    assert order[-3:] == wanted


def test_a_webhook_of_the_registry_is_followed_long_before_the_next_poll(served: Served):
    from mlflow import MlflowClient

    client = MlflowClient(registry_uri=served.shelf.uri)
    url = f"{served.session.url}/told/registry/webhook"
    hook = client.create_webhook("told", url, ["model_version_alias.created"], secret="hush")
    try:
        path = "/told/told/predict"
        for p in (0.35, 0.45):
            version = served.offer(p)
            until(lambda v=version: served.answer(path)["version"] == v, f"{version} serves", 60)
    finally:
        client.delete_webhook(hook.webhook_id)


def test_a_bad_version_takes_no_traffic_and_is_named(served: Served, tmp_path: Path):
    before = served.answer()["version"]
    bad = constant(0.5)
    bad.intercept_[:] = np.nan
    files = skops(tmp_path / "nan", bad)
    version = served.shelf.register(NAME, files, "champion")
    until(lambda: served.shelf.tag(NAME, version, REFUSED_TAG), "the registry was told")
    assert "not finite" in str(served.shelf.tag(NAME, version, REFUSED_TAG))
    assert served.answer()["version"] == before
    text = f"version {version} of 'served' is refused"
    # The replica that told the registry may be the other one.
    until(lambda: text in served.http.get("/readyz").text, "readiness says why")
    assert served.answer()["version"] == before
    served.shelf.alias(NAME, before)
    until(lambda: "notes" not in served.http.get("/readyz").json(), "nothing to complain of")


OIP = {
    "inputs": [
        {"name": name, "shape": [1], "datatype": "FP64", "data": [value]}
        for name, value in ROW.items()
    ]
}


def test_a_request_may_pin_a_version_in_every_protocol(served: Served):
    first = served.offer(0.5, alias=True)
    served.until_serves(first)
    other = served.offer(0.75, alias=False)
    served.shelf.client.set_registered_model_tag(NAME, LIVE_TAG, other)
    metadata = "/v2/models/scored"
    until(lambda: served.http.get(metadata).json()["versions"] == [first, other], "both are live")
    asked = {"x-model-version": other}
    until(
        lambda: served.http.post(
            "/placed/scored/predict", json={"rows": [ROW]}, headers=asked
        ).status_code == 200,
        "both are live in the placed node",
    )  # fmt: skip
    for version, score in ((first, 0.5), (other, 0.75)):
        headers = {"x-model-version": version}
        for base in ("", "/placed"):
            typed = served.answer(f"{base}/scored/predict", **headers)
            assert (typed["version"], round(typed["score"], 9)) == (version, score)
            path = f"{base}/v2/models/scored/versions/{version}/infer"
            oip = served.http.post(path, json=OIP).json()
            assert oip["model_version"] == version
            outputs = {each["name"]: each["data"] for each in oip["outputs"]}
            assert (outputs["version"], round(outputs["score"][0], 9)) == ([version], score)
            path = f"{base}/v1/models/scored/versions/{version}:predict"
            tf = served.http.post(path, json={"instances": [ROW]}).json()
            assert tf["predictions"][0]["version"] == version
            mlflow = served.http.post(
                f"{base}/invocations", json={"dataframe_records": [ROW]}, headers=headers
            ).json()
            assert mlflow["predictions"][0]["version"] == version
        answer = asyncio.run(_grpc(served, version))
        assert answer.model_version == version
        assert b"".join(answer.raw_output_contents).find(version.encode()) >= 0


async def _grpc(served: Served, version: str) -> Any:
    target = f"127.0.0.1:{served.session.grpc_port}"
    request = pb.ModelInferRequest(model_name="scored", model_version=version)
    for name, value in ROW.items():
        tensor = request.inputs.add(name=name, datatype="FP64", shape=[1])
        tensor.contents.fp64_contents.append(value)
    async with grpc.aio.insecure_channel(target) as channel:
        call = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelInferResponse.FromString,
        )
        return await call(request, metadata=(("application", "scored"),), timeout=60)


def test_a_version_that_is_not_live_is_not_found_and_harms_no_other_request(served: Served):
    with Load(f"{served.session.url}/scored/predict", connections=4) as load:
        for path, body in (
            ("/v2/models/scored/versions/999/infer", OIP),
            ("/v1/models/scored/versions/999:predict", {"instances": [ROW]}),
        ):
            for _ in range(20):
                found = served.http.post(path, json=body)
                assert found.status_code == 404, found.text
                assert "999" in found.text
    assert load.failed == []
    assert load.answered > 0
    word = served.http.post(
        "/scored/predict", json={"rows": [ROW]}, headers={"x-model-version": "latest"}
    )
    assert word.status_code == 400


def test_a_registry_that_is_away_for_a_while_stops_nothing(served: Served, server: Any):
    before = served.answer()["version"]
    with Load(f"{served.session.url}/scored/predict", connections=4) as load:
        server.stop()
        try:
            began_s = time.monotonic()
            until(
                lambda: "has not answered" in served.http.get("/readyz").text, "readiness says it"
            )
            until(lambda: time.monotonic() - began_s > 10, "ten seconds")
            assert served.answer()["version"] == before
        finally:
            server.start()
        following = served.offer(0.5)
        served.until_serves(following)
    assert load.failed == []
