"""The Open Inference Protocol's methods on the ingress deployment, for calls that come through
Serve's own gRPC proxy; `grpc_door` has the short way of calls that reach a replica directly.
"""

from collections.abc import AsyncIterator
from typing import Any

from twinpath.errors import TwinpathError
from twinpath.online.dataplane import Ask
from twinpath.online.frontend import Frontend
from twinpath.online.oip_service import OipService, status_of
from twinpath.online.protocols import oip_pb2 as pb


def _method(name: str) -> Any:
    async def call(self: "GrpcMethods", request: Any, grpc_context: Any) -> Any:
        service = OipService(self._frontend())
        ask = _ask(service, name, request, grpc_context)
        try:
            if name != "ModelInfer":
                return await service.other(name, request, ask)
            return pb.ModelInferResponse.FromString(await service.infer(request, ask))
        except TwinpathError as error:
            # Serve sends the code that was set before the method raised.
            grpc_context.set_code(status_of(error))
            grpc_context.set_details(error.message[:2000])
            raise

    call.__name__ = name
    return call


class GrpcMethods:
    """Mixed into the ingress; Serve calls the method of an RPC's name."""

    def _frontend(self) -> Frontend:
        raise NotImplementedError

    ServerLive = _method("ServerLive")
    ServerReady = _method("ServerReady")
    ModelReady = _method("ModelReady")
    ServerMetadata = _method("ServerMetadata")
    ModelMetadata = _method("ModelMetadata")
    ModelConfig = _method("ModelConfig")
    ModelStatistics = _method("ModelStatistics")
    RepositoryIndex = _method("RepositoryIndex")
    RepositoryModelLoad = _method("RepositoryModelLoad")
    RepositoryModelUnload = _method("RepositoryModelUnload")
    ModelInfer = _method("ModelInfer")

    async def ModelStreamInfer(self, request: Any, grpc_context: Any) -> AsyncIterator[Any]:
        """An answer for each message of a stream."""
        service = OipService(self._frontend())
        async for answer in service.stream(
            request, lambda message: _ask(service, "ModelStreamInfer", message, grpc_context)
        ):
            yield answer


def _ask(service: OipService, method: str, message: Any, context: Any) -> Ask:
    metadata = context.invocation_metadata() or ()
    return service.ask(method, metadata, "", None, message.ByteSize())
