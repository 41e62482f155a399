"""What Serve sees to itself, when a user sets it, is not bypassed: request timeouts, and the bound
of Serve's own queue. Here all requests go Serve's way, over HTTP and gRPC; the bytes still come
through HAProxy, which has less patience with headers than by default."""

import asyncio
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
import yaml

from online.callers import Caller, all_right, answered
from online.conftest import HERE, ROOT, application, until
from twinpath.online.environment import GRPC_SERVICES, slow_clients
from twinpath.online.protocols import oip_pb2 as pb
from twinpath.online.session import ServeSession

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(240)]
TIMEOUT_S, HEADERS_S = 4.0, 3


class Unstarted(ServeSession):
    """A Ray on which the first config starts Serve, since only that one can set its options."""

    def start_serve(self) -> None: ...


@pytest.fixture(scope="module")
def session() -> Iterator[ServeSession]:
    """A Serve that was started by a config with request timeouts."""
    paths = [ROOT / "platform", ROOT, HERE]
    env = slow_clients(HEADERS_S, 300)
    with Unstarted(num_cpus=8, pythonpath=paths, env=env) as session:
        # Few run at a time, and few may wait in Serve for their turn.
        bounded: dict[str, Any] = application("waiting") | {
            "name": "bounded",
            "route_prefix": "/bounded",
            "deployments": [
                {"name": "waiting", "max_ongoing_requests": 4, "max_queued_requests": 8}
            ],
        }
        document = {
            "http_options": {
                "host": "127.0.0.1", "port": session.http_port, "request_timeout_s": TIMEOUT_S,
            },
            "grpc_options": {
                "port": session.grpc_port, "grpc_servicer_functions": [GRPC_SERVICES],
                "request_timeout_s": TIMEOUT_S,
            },
            "applications": [application("waiting"), bounded],
        }  # fmt: skip
        config = session.folder / "settings.yaml"
        config.write_text(yaml.safe_dump(document))
        session.deploy(config)
        session.wait_until_ready("/waiting/readyz", "/bounded/readyz")
        for app in ("waiting", "bounded"):
            until(lambda app=app: call(session, app, 0.01) == "OK", 60, "gRPC reaches it")
        yield session


def call(session: ServeSession, app: str, seconds: float) -> str:
    """The status of a call that keeps the graph busy for so long."""
    request = pb.ModelInferRequest(model_name="waiting")
    x = request.inputs.add(name="x", datatype="FP64", shape=[1])
    x.contents.fp64_contents.append(seconds)
    with grpc.insecure_channel(f"127.0.0.1:{session.grpc_port}") as channel:
        infer = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelInferResponse.FromString,
        )
        try:
            infer(request, metadata=(("application", app),), timeout=60)
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"


async def test_serves_request_timeout_is_kept(session: ServeSession):
    """408 is Serve's status for it; rows that waited are not run, and those after them are."""
    first = Caller(session.http_port, 0, TIMEOUT_S + 3)
    waiting = [Caller(session.http_port, number) for number in range(1, 32)]
    await first.ask()
    await asyncio.sleep(0.3)
    await asyncio.gather(*(caller.ask() for caller in waiting))
    assert {reply.status for reply in await answered([first, *waiting])} == {408}
    later = [Caller(session.http_port, number) for number in range(100, 108)]
    await asyncio.sleep(3)  # until what ran is through
    await asyncio.gather(*(caller.ask() for caller in later))
    assert all_right(later, await answered(later))


async def test_serves_own_bound_of_its_queue_is_kept(session: ServeSession):
    callers = [Caller(session.http_port, number, 0.2, "bounded") for number in range(48)]
    await asyncio.gather(*(caller.ask() for caller in callers))
    replies = await answered(callers)
    accepted = [each for each in zip(callers, replies, strict=True) if each[1].status == 200]
    assert all(caller.is_right(reply) for caller, reply in accepted)
    refused = [reply for reply in replies if reply.status == 503]
    assert len(accepted) + len(refused) == 48
    assert len(accepted) >= 12
    assert all(b"dropped due to backpressure" in reply.body for reply in refused)
    assert len(refused) >= 12


def test_the_same_holds_for_grpc(session: ServeSession):
    with ThreadPoolExecutor(33) as pool:
        late = pool.submit(call, session, "waiting", TIMEOUT_S + 3)
        codes = list(pool.map(lambda _: call(session, "bounded", 0.4), range(32)))
        assert set(codes) == {"OK", "RESOURCE_EXHAUSTED"}
        assert codes.count("OK") >= 12
        assert late.result() == "DEADLINE_EXCEEDED"


def test_the_replica_says_what_serves_timeout_costs_and_what_to_use(session: ServeSession):
    logs = [path.read_text(errors="replace") for path in session.folder.rglob("replica_*.log")]
    assert any("request_timeout_s is 4" in log and "ingress.queue_timeout_s" in log for log in logs)


async def test_headers_that_do_not_come_to_their_end_are_given_up(session: ServeSession):
    async def linger(drop: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", session.http_port)
        writer.write(b"POST /waiting/predict HTTP/1.1\r\nhost: x\r\nx-slow: ")
        for _ in range(80):
            try:
                async with asyncio.timeout(0.25):
                    return await reader.read(1000)
            except TimeoutError:
                writer.write(drop)
        return b""

    slow = asyncio.gather(*(linger(drop) for drop in (b"a", b"") for _ in range(50)))
    while not slow.done():
        caller = Caller(session.http_port, 1)
        await caller.ask()
        assert caller.is_right(await caller.answer())
        await asyncio.sleep(0.1)
    assert all(got.startswith(b"HTTP/1.1 408 ") for got in slow.result())


def test_haproxy_lets_go_on_who_wakes_it(session: ServeSession):
    balancers = [each.pid for each in session.processes() if each.name() == "haproxy"]
    assert balancers
    assert {os.sched_getscheduler(pid) for pid in balancers} == {os.SCHED_BATCH}
