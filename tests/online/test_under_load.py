"""What stays true while a served graph is loaded: scaling, draining, redeploys, ids and counts."""

import contextlib
import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import httpx
import pytest

from online.conftest import Served, application, until
from twinpath.online.protocols import oip_pb2 as pb

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]


class Clients:
    """Threads that ask one application again and again, each time with an id and a number of its
    own, and note whatever is not the one right answer."""

    def __init__(self, url: str, count: int, pause_s: float = 0.0) -> None:
        self._url, self._pause_s = url, pause_s
        self._numbers = itertools.count(1000)
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask) for _ in range(count)]
        #: Requests that were answered as they should be, and what the others got.
        self.good, self.wrong = 0, list[str]()

    @contextlib.contextmanager
    def asking(self) -> Iterator["Clients"]:
        """They ask while the block runs; at its end each has had its last answer."""
        for thread in self._threads:
            thread.start()
        try:
            yield self
        finally:
            self._over.set()
            for thread in self._threads:
                thread.join()

    def _opened(self) -> Any:
        return httpx.Client(timeout=60)

    def _ask(self) -> None:
        with self._opened() as client:
            while not self._over.is_set():
                with self._lock:
                    number = next(self._numbers)
                problem = self._problem(client, number)
                with self._lock:
                    if problem is None:
                        self.good += 1
                    else:
                        self.wrong.append(f"request {number}: {problem}")
                time.sleep(self._pause_s)

    def _problem(self, client: Any, number: int) -> str | None:
        name, label = f"load-{number}", f"row {number}"
        body = {"rows": [{"x": float(number), "label": label}]}
        try:
            answer = client.post(self._url, json=body, headers={"x-request-id": name})
        except httpx.HTTPError as error:
            return repr(error)
        if answer.status_code != 200:
            return f"{answer.status_code} {answer.text[:200]} {dict(answer.headers)}"
        if answer.headers.get_list("x-request-id") != [name]:
            return f"it has the ids {answer.headers.get_list('x-request-id')}"
        rows = answer.json()["rows"]
        return None if len(rows) == 1 and rows[0]["label"] == label else f"it has the rows {rows}"


class GrpcClients(Clients):
    """The same over gRPC: ``url`` is the server's address, and the application's name."""

    def _opened(self) -> Any:
        return grpc.insecure_channel(self._url.partition("/")[0])

    def _problem(self, client: Any, number: int) -> str | None:
        request = pb.ModelInferRequest(model_name="pausing")
        x = request.inputs.add(name="x", datatype="FP64", shape=[1])
        x.contents.fp64_contents.append(number)
        label = request.inputs.add(name="label", datatype="BYTES", shape=[1])
        label.contents.bytes_contents.append(b"row %d" % number)
        infer = client.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelInferResponse.FromString,
        )
        metadata = (("application", self._url.partition("/")[2]),)
        try:
            answer = infer(request, metadata=metadata, timeout=60)
        except grpc.RpcError as error:
            return f"{error.code()} {error.details()}"
        raw = b"".join(answer.raw_output_contents)
        return None if b"row %d" % number in raw else f"it has the outputs {answer}"


@contextlib.contextmanager
def also_deployed(served: Served, name: str, version: str = "1") -> Iterator[Callable[[str], None]]:
    """The graph `pausing` below ``/name`` besides everything else; what is given redeploys it as
    another version."""
    before = served.applications

    def deploy(version: str) -> None:
        replicas = {"min": 1, "max": 3, "target_queue": 4, "downscale_delay_s": 2.0}
        mine = application(
            "pausing", version=version, ingress={"num_cpus": 0.1, "replicas": replicas}
        )
        served.deploy([*before, mine | {"name": name, "route_prefix": f"/{name}"}])

    deploy(version)
    try:
        served.session.wait_until_ready(f"/{name}/readyz")
        yield deploy
    finally:
        served.deploy(before)
        until(lambda: not served.application(name), 90, "the application is gone")


def version_of(served: Served, app: str) -> str:
    with served.client(app) as client:
        answer = client.get("/v2/models/pausing")
    return answer.json()["versions"][0] if answer.status_code == 200 else ""


def test_the_queue_scales_an_ingress_and_neither_its_drain_nor_a_redeploy_loses_a_request(
    served: Served,
):
    with also_deployed(served, "elastic") as redeploy:
        url = f"{served.session.url}/elastic/pausing/predict"
        address = f"127.0.0.1:{served.session.grpc_port}/elastic"

        def running() -> int:
            return served.replicas("elastic", "pausing")

        with Clients(url, 12).asking() as crowd, GrpcClients(address, 4).asking() as calls:
            until(lambda: running() == 3, 90, "a queue of 16 rows gives three replicas")
        assert (crowd.wrong, calls.wrong) == ([], [])
        assert crowd.good > 12
        assert calls.good > 4
        few, fewer = Clients(url, 2, pause_s=0.02), GrpcClients(address, 1, pause_s=0.02)
        with few.asking(), fewer.asking():
            until(lambda: running() == 1, 90, "two of them drain while three clients go on")
            until(lambda: min(few.good, fewer.good) > 10, 60, "who are answered")
            redeploy("2")
            until(lambda: version_of(served, "elastic") == "2", 90, "the new version answers")
            until(lambda: running() == 1, 90, "and the old one is gone")
            seen = few.good, fewer.good
            until(lambda: few.good > seen[0] + 10, 60, "answers of the new one")
            until(lambda: fewer.good > seen[1] + 10, 60, "and over gRPC")
        assert (few.wrong, fewer.wrong) == ([], [])


def test_ids_and_counts_of_every_request_stay_exact(served: Served):
    route = "/fused/fused/predict"

    def counts() -> tuple[int, int, int]:
        with served.client("fused") as client:
            stats = client.get("/v2/models/fused/stats").json()["model_stats"][0]
        lines = [
            line
            for line in served.metrics()
            if line.startswith("ray_twinpath_requests_total{")
            and all(part in line for part in ('graph="fused"', 'transport="http"', 'status="200"'))
            and stats_replica(served) in line
        ]
        ours = sum(float(line.rpartition(" ")[2]) for line in lines)
        return stats["inference_stats"]["success"]["count"], served.counted("fused", route), ours

    def settled() -> tuple[int, int, int]:
        """Once what was counted before has reached the exporters."""
        seen, since_s = counts(), time.monotonic()
        while time.monotonic() - since_s < 6:
            time.sleep(0.5)
            now = counts()
            if now != seen:
                seen, since_s = now, time.monotonic()
        return seen

    before = settled()
    with Clients(f"{served.session.url}{route}", 16).asking() as crowd:
        until(lambda: crowd.good + len(crowd.wrong) >= 400, 60, "400 requests")
    assert crowd.wrong == []
    wanted = tuple(count + crowd.good for count in before)
    until(lambda: counts() == wanted, 60, f"exactly {wanted}")
    assert settled() == wanted


def stats_replica(served: Served) -> str:
    """The id of the one replica of the application `fused`."""
    [replica] = served.application("fused")["deployments"]["fused"]["replicas"]
    found: str = replica["replica_id"]
    return found


def test_rows_of_clients_that_hang_up_are_not_run_and_leave_nothing(served: Served):
    """One row runs for 0.3 s, and one more waits; the client of the latter goes away."""

    def stats() -> tuple[int, int]:
        with served.client("tight") as client:
            found = client.get("/v2/models/tight/stats").json()["model_stats"][0]
        return found["inference_count"], found["inference_stats"]["fail"]["count"]

    body = b'{"rows": [{"x": 1}]}'
    head = b"POST /tight/tight/predict HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"

    def ask() -> httpx.Response:
        with served.client("tight") as client:
            return client.post("/tight/predict", content=body)

    assert ask().status_code == 200
    run, failed = stats()
    for _ in range(4):
        address = ("127.0.0.1", served.session.http_port)
        with socket.create_connection(address) as first, socket.create_connection(address) as gone:
            first.sendall(head % len(body) + body)
            time.sleep(0.05)
            gone.sendall(head % len(body) + body)
            time.sleep(0.05)
            gone.close()
            assert first.recv(1000).startswith(b"HTTP/1.1 200")
    until(lambda: stats() == (run + 4, failed + 4), 60, f"four of eight run, not {stats()}")
    # Their places in the queue of two rows are free again.
    assert [ask().status_code for _ in range(3)] == [200] * 3
