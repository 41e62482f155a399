"""The gRPC service of the Open Inference Protocol, for any ``grpc.aio`` server."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import grpc

import twinpath
from twinpath.errors import GRPC_STATUS, BodyTooLargeError, TwinpathError
from twinpath.online.dataplane import Ask
from twinpath.online.exchange import Answer, Codec, Refused, Request
from twinpath.online.frontend import Frontend
from twinpath.online.protocols import oip_grpc
from twinpath.online.protocols import oip_pb2 as pb
from twinpath.online.protocols.oip_rest import InferCodec

SERVICE = "inference.GRPCInferenceService"
#: Requests of one stream that run at the same time.
STREAM_WINDOW = 64
#: Methods beside inference, with the type of their request.
METHODS: dict[str, Any] = {
    "ServerLive": pb.ServerLiveRequest,
    "ServerReady": pb.ServerReadyRequest,
    "ModelReady": pb.ModelReadyRequest,
    "ServerMetadata": pb.ServerMetadataRequest,
    "ModelMetadata": pb.ModelMetadataRequest,
    "ModelConfig": pb.ModelConfigRequest,
    "ModelStatistics": pb.ModelStatisticsRequest,
    "RepositoryIndex": pb.RepositoryIndexRequest,
    "RepositoryModelLoad": pb.RepositoryModelLoadRequest,
    "RepositoryModelUnload": pb.RepositoryModelUnloadRequest,
}


class OipService:
    """Answers messages for one frontend, whatever server read them."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend
        self.plane = frontend.plane
        self._rest = InferCodec(frontend.plane)

    def ask(
        self,
        method: str,
        metadata: Iterable[tuple[str, Any]],
        peer: str,
        remaining_s: float | None,
        size_bytes: int,
    ) -> Ask:
        """What the gateway's rules see of a call; the caller's deadline is the request's."""
        headers = {
            key.lower().encode(): value if isinstance(value, bytes) else value.encode()
            for key, value in metadata
        }
        ask = self._frontend.ask(f"/{SERVICE}/{method}", headers, size_bytes, peer)
        ask.transport = "grpc"
        if remaining_s is not None:
            ask.deadline_s = time.monotonic() + remaining_s
        return ask

    async def infer(self, message: pb.ModelInferRequest, ask: Ask) -> bytes:
        """The serialised ModelInferResponse. Raises TwinpathError."""
        codec: Codec = oip_grpc.GrpcCodec(self.plane, self._rest, message)
        limit = self._frontend.max_body_bytes
        if ask.body_bytes > limit:
            text = f"the message has {ask.body_bytes} bytes, and the limit is {limit}"
            codec = Refused(codec, BodyTooLargeError(f"{text}: send fewer rows"))
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        exchange = self._frontend.begin(
            codec,
            Request(ask.path, b"", ask.headers, b""),
            ask,
            lambda answer: None if future.done() else future.set_result(answer),
        )
        try:
            answer = await future
        except asyncio.CancelledError:
            exchange.give_up()
            raise
        if answer.status >= 400:
            raise _Refused(answer)
        return answer.body

    async def stream(
        self, messages: AsyncIterator[pb.ModelInferRequest], ask: Callable[[Any], Ask]
    ) -> AsyncIterator[pb.ModelStreamInferResponse]:
        """An answer for each message, in their order; errors are answers too."""
        window: asyncio.Queue[asyncio.Task[bytes] | None] = asyncio.Queue(STREAM_WINDOW)
        loop = asyncio.get_running_loop()

        async def read() -> None:
            try:
                async for message in messages:
                    await window.put(loop.create_task(self.infer(message, ask(message))))
            finally:
                await window.put(None)

        reader = loop.create_task(read())
        task = None
        try:
            while (task := await window.get()) is not None:
                try:
                    whole = pb.ModelInferResponse.FromString(await task)
                    yield pb.ModelStreamInferResponse(infer_response=whole)
                except TwinpathError as error:
                    yield pb.ModelStreamInferResponse(error_message=error.message)
            await reader
        finally:
            reader.cancel()
            while task is not None or not window.empty():
                if task is not None:
                    task.cancel()
                task = None if window.empty() else window.get_nowait()

    async def other(self, method: str, message: Any, ask: Ask) -> Any:
        """The answer to any other method. Raises TwinpathError."""
        gate = None if method in ("ServerLive", "ServerReady") else self._frontend.gate
        if gate is None:
            return await oip_grpc.answer(self.plane, method, message, twinpath.__version__)
        try:
            pending = gate.admit(ask)
            if pending is not None:
                await pending
            answer = await oip_grpc.answer(self.plane, method, message, twinpath.__version__)
        except Exception as error:
            known = error if isinstance(error, TwinpathError) else TwinpathError
            gate.done(ask, known.http_status, known.code)
            raise
        gate.done(ask, 200, "ok")
        return answer


class _Refused(TwinpathError):
    """An exchange was answered with an error."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.body.decode())
        self._answer = answer
        self.http_status = answer.status  # type: ignore[misc]  # of this one, not of its class
        self.trailers = [(k.decode(), v.decode("latin-1")) for k, v in answer.headers]

    def __reduce__(self) -> tuple[Any, ...]:
        # It travels from a replica to Serve's gRPC proxy.
        return type(self), (self._answer,)


def status_of(error: TwinpathError) -> grpc.StatusCode:
    """The gRPC status of an error."""
    code: grpc.StatusCode = grpc.StatusCode[GRPC_STATUS.get(error.http_status, "INTERNAL")]
    return code


def service_handlers(
    find: Callable[[], OipService | None], counted: Callable[[str], Any]
) -> grpc.GenericRpcHandler:
    """Handlers for a ``grpc.aio`` server. ``find`` gives the service once it exists; ``counted``
    makes a context manager of a method's name, which is told of the call's gRPC status."""

    def asked(context: Any, method: str, message: Any, service: OipService) -> Ask:
        return service.ask(
            method, context.invocation_metadata() or (), context.peer(),
            context.time_remaining(), message.ByteSize(),
        )  # fmt: skip

    async def served(context: Any) -> OipService:
        service = find()
        if service is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the graph is not set up yet")
        assert service is not None
        return service

    async def refused(context: Any, error: TwinpathError, *more: tuple[str, str]) -> None:
        trailers = getattr(error, "trailers", ())
        await context.abort(status_of(error), error.message[:2000], (*trailers, *more))

    async def infer(message: Any, context: Any) -> bytes:
        service = await served(context)
        with counted("ModelInfer") as record:
            ask = asked(context, "ModelInfer", message, service)
            request_id = ("x-request-id", ask.request_id.decode("latin-1"))
            context.set_trailing_metadata((request_id,))
            try:
                body = await service.infer(message, ask)
            except TwinpathError as error:
                record(status_of(error).name)
                await refused(context, error, request_id)
                raise
            record("OK")
        return body

    async def stream(messages: Any, context: Any) -> AsyncIterator[bytes]:
        service = await served(context)
        with counted("ModelStreamInfer") as record:
            async for answer in service.stream(
                messages, lambda m: asked(context, "ModelStreamInfer", m, service)
            ):
                yield answer.SerializeToString()
            record("OK")

    def other(method: str) -> Any:
        async def handle(message: Any, context: Any) -> bytes:
            service = await served(context)
            with counted(method) as record:
                try:
                    ask = asked(context, method, message, service)
                    answered = await service.other(method, message, ask)
                except TwinpathError as error:
                    record(status_of(error).name)
                    await refused(context, error)
                    raise
                body: bytes = answered.SerializeToString()
                record("OK")
            return body

        return handle

    handlers = {
        name: grpc.unary_unary_rpc_method_handler(other(name), request_deserializer=kind.FromString)
        for name, kind in METHODS.items()
    }
    handlers["ModelInfer"] = grpc.unary_unary_rpc_method_handler(
        infer, request_deserializer=pb.ModelInferRequest.FromString
    )
    handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(
        stream, request_deserializer=pb.ModelInferRequest.FromString
    )
    return grpc.method_handlers_generic_handler(SERVICE, handlers)
