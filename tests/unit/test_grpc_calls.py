"""Calls over a real gRPC server: counted, and given up when nobody waits for them any more."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
from pydantic import BaseModel

from twinpath import Batch, Columns, Graph, Node
from twinpath.errors import TwinpathError
from twinpath.graph.stage import Executor
from twinpath.online.app import graph_app
from twinpath.online.batcher import Batcher
from twinpath.online.grpc_door import add_to_server
from twinpath.online.oip_service import METHODS, SERVICE, OipService, service_handlers
from twinpath.online.protocols import oip_pb2 as pb


class Row(BaseModel):
    x: float


class Gate(Node):
    """Rows wait in it until it opens."""

    inputs, outputs = {"x": "float64"}, {"x": "float64"}

    def __init__(self) -> None:
        self.ran: list[float] = []
        self.entered, self.opened = asyncio.Event(), asyncio.Event()

    async def predict(self, columns: Columns) -> Columns:
        self.ran += columns["x"].tolist()
        self.entered.set()
        await self.opened.wait()
        return {"x": columns["x"]}


class Served:
    """A server with one graph that runs one batch at a time."""

    def __init__(self) -> None:
        self.ongoing = 0
        self.ended: list[tuple[str, str]] = []
        graph = Graph("numbers", input=Row, output=Row)
        with graph as rows:
            graph.output(Gate()(rows))
        executor = Executor(graph.plan)
        executor.setup()
        [self.node] = executor.nodes.values()
        self.batcher = Batcher(executor.run, Batch())
        app = graph_app(graph.plan, self.batcher, max_body_bytes=1000)
        self.service = OipService(app.frontend)

    @contextlib.contextmanager
    def counted(self, method: str) -> Iterator[Any]:
        self.ongoing += 1
        how: list[str] = []
        try:
            yield how.append
        finally:
            self.ongoing -= 1
            self.ended += [(method, code) for code in how or ["CANCELLED"]]

    @asynccontextmanager
    async def channel(self) -> AsyncIterator[grpc.aio.Channel]:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((service_handlers(lambda: self.service, self.counted),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
        await server.stop(None)
        await self.batcher.close()

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Any]:
        async with self.channel() as channel:
            yield channel.unary_unary(
                f"/{SERVICE}/ModelInfer",
                request_serializer=pb.ModelInferRequest.SerializeToString,
                response_deserializer=pb.ModelInferResponse.FromString,
            )

    async def until(self, condition: Any) -> None:
        async with asyncio.timeout(30):
            while not condition():  # noqa: ASYNC110  # what is waited for has no event
                await asyncio.sleep(0.005)


def numbers(*values: float) -> pb.ModelInferRequest:
    message = pb.ModelInferRequest(model_name="numbers")
    message.inputs.add(name="x", datatype="FP64", shape=[len(values)])
    message.raw_input_contents.append(np.array(values, "<f8").tobytes())
    return message


async def test_rows_whose_callers_deadline_is_over_are_not_run():
    served = Served()
    async with served.client() as infer:
        first = infer(numbers(1))
        await served.node.entered.wait()
        waited = infer(numbers(2), timeout=0.2)
        assert await waited.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        await served.until(lambda: served.batcher.queued_rows == 0)
        served.node.opened.set()
        await first
        assert (await infer(numbers(3))).raw_output_contents
        assert served.node.ran == [1.0, 3.0]
        await served.until(lambda: len(served.ended) == 3)
    assert served.ongoing == 0


async def test_a_deadline_holds_without_a_caller_who_cancels():
    served = Served()
    service = served.service
    first = asyncio.create_task(service.infer(numbers(1), service.ask("", (), "", None, 0)))
    await served.node.entered.wait()
    with pytest.raises(TwinpathError) as late:
        await service.infer(numbers(2), service.ask("ModelInfer", (), "", 0.05, 0))
    assert late.value.http_status == 504
    served.node.opened.set()
    await first
    assert served.node.ran == [1.0]
    await served.batcher.close()


async def test_rows_of_a_caller_who_cancels_are_not_run_and_are_counted():
    served = Served()
    async with served.client() as infer:
        first = infer(numbers(1))
        await served.node.entered.wait()
        second = infer(numbers(2))
        await served.until(lambda: served.ongoing == 2)
        await served.until(lambda: served.batcher.queued_rows == 1)
        second.cancel()
        await served.until(lambda: served.ongoing == 1)
        assert served.batcher.queued_rows == 0
        served.node.opened.set()
        await first
        assert served.node.ran == [1.0]
    assert served.ended == [("ModelInfer", "CANCELLED"), ("ModelInfer", "OK")]


async def test_calls_are_counted_by_their_status_and_tell_their_id():
    served = Served()
    served.node.opened.set()
    async with served.client() as infer:
        call = infer(numbers(1), metadata=(("x-request-id", "mine"),))
        await call
        assert ("x-request-id", "mine") in tuple(await call.trailing_metadata())
        wrong = infer(pb.ModelInferRequest(model_name="letters"))
        assert await wrong.code() == grpc.StatusCode.NOT_FOUND
        ids = [value for name, value in await wrong.trailing_metadata() if name == "x-request-id"]
        assert len(ids) == 1
        large = numbers(*range(200))
        assert await infer(large).code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert [code for _, code in served.ended] == ["OK", "NOT_FOUND", "RESOURCE_EXHAUSTED"]


async def test_methods_beside_inference_are_counted_too():
    served = Served()
    calls = [(name, METHODS[name](), "OK") for name in METHODS]
    for _, message, _ in calls:
        for field in ("name", "model_name"):
            if field in message.DESCRIPTOR.fields_by_name:
                setattr(message, field, "numbers")
    calls.append(("ModelMetadata", pb.ModelMetadataRequest(name="letters"), "NOT_FOUND"))
    async with served.channel() as channel:
        for name, message, code in calls:
            call = channel.unary_unary(f"/{SERVICE}/{name}")(message.SerializeToString())
            assert (await call.code()).name == code
    assert served.ended == [(name, code) for name, _, code in calls]
    assert served.ongoing == 0


class Server:
    """The part of Serve's gRPC server in a replica that is written to."""

    def __init__(self, max_queued_requests: int, request_timeout_s: float | None) -> None:
        self.max_queued_requests = max_queued_requests
        self._grpc_options = SimpleNamespace(request_timeout_s=request_timeout_s)
        self._metrics_manager = self._user_callable_wrapper = self._deployment_id = None
        self.untouched: list[str] = []
        self.handlers = 0

    def service_handler_factory(self) -> None:
        """A method of the replica, by which that is found."""

    def add_passthrough_service(self, name: str) -> None:
        self.untouched.append(name)

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        self.handlers += len(handlers)

    def add_registered_method_handlers(self, service: str, handlers: Any) -> None: ...


@pytest.mark.parametrize(
    ("queued", "timeout_s", "ours"), [(-1, None, True), (-1, 2.0, False), (10, None, False)]
)
def test_what_serve_must_see_to_itself_is_left_to_it(
    queued: int, timeout_s: float | None, ours: bool
):
    server = Server(queued, timeout_s)
    add_to_server(None, server)
    assert (SERVICE in server.untouched) is ours
    assert server.handlers >= 1
