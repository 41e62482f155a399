"""Open Inference Protocol v2 over gRPC: messages as columns, and back. Pure translation."""

from collections.abc import Callable, Mapping
from typing import Any

from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message
from numpy.typing import NDArray

from twinpath.errors import InputError, TwinpathError, did_you_mean
from twinpath.graph.columns import Columns, Outcome
from twinpath.online.dataplane import DataPlane, whole
from twinpath.online.exchange import Answer, Call, Request
from twinpath.online.protocols import oip_pb2 as pb
from twinpath.online.protocols.oip_model import EXTENSIONS
from twinpath.online.protocols.oip_rest import (
    InferCodec,
    Output,
    classified,
    metadata,
    same_rows,
    urgency,
)
from twinpath.online.protocols.oip_tensors import (
    checked_shape,
    datatype_of,
    from_json,
    from_raw,
    to_column,
    to_raw,
)

PROTOBUF = b"application/x-protobuf"
#: OIP datatype → the field of InferTensorContents that holds its values.
_CONTENTS = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents",
    "INT32": "int_contents", "INT64": "int64_contents", "UINT8": "uint_contents",
    "UINT16": "uint_contents", "UINT32": "uint_contents", "UINT64": "uint64_contents",
    "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip


class GrpcCodec:
    """`exchange.Codec` of one ``ModelInferRequest``; the answer's body is the serialised
    response, or the text of an error."""

    def __init__(self, plane: DataPlane, rest: InferCodec, message: pb.ModelInferRequest) -> None:
        self._plane, self._rest, self._message = plane, rest, message

    def decode(self, request: Request) -> Call | Answer:
        """See `exchange.Codec`."""
        message, rest = self._message, self._rest
        self._plane.find(message.model_name, message.model_version or None)
        columns = self._plane.checked(self._columns())
        parameters = _parameters(message.parameters)
        asked = [{"name": o.name, "parameters": _parameters(o.parameters)} for o in message.outputs]
        wanted = rest.wanted({"outputs": asked}, parameters)
        timeout_s, priority = urgency(parameters)
        version = message.model_version if self._plane.pinnable else ""
        pin = version if version.isdigit() else None
        return Call(columns, lambda ran: self._encode(ran, wanted), timeout_s, priority, pin)

    def refuse(self, error: TwinpathError) -> Answer:
        """See `exchange.Codec`."""
        return Answer(error.http_status, error.message.encode(), b"text/plain")

    def _columns(self) -> Columns:
        known = self._plane.metadata.inputs
        raw = self._message.raw_input_contents
        if raw and len(raw) != len(self._message.inputs):
            raise InputError(
                f"{len(raw)} raw_input_contents for {len(self._message.inputs)} inputs: send one "
                "for each, or contents in each"
            )
        columns: Columns = {}
        for i, tensor in enumerate(self._message.inputs):
            name, shape = tensor.name, list(tensor.shape)
            kind = known.get(name)
            if kind is None:
                raise InputError(f"unknown input {name!r}.{did_you_mean(name, known)}")
            if name in columns:
                raise InputError(f"input {name!r} is given twice")
            if raw:
                values = from_raw(name, tensor.datatype, shape, memoryview(raw[i]))
            else:
                values = _typed(name, tensor, shape)
            columns[name] = to_column(name, kind, values)
        same_rows(columns)
        return columns

    def _encode(self, outcome: Outcome, wanted: list[Output]) -> Answer:
        columns = whole(outcome)
        response = pb.ModelInferResponse(
            model_name=self._plane.name,
            model_version=self._message.model_version or self._plane.version,
            id=self._message.id,
        )
        for output in wanted:
            values = columns[output.name]
            datatype = datatype_of(self._plane.metadata.outputs[output.name])
            if output.classes:
                values, datatype = classified(output.name, values, output.classes), "BYTES"
            response.outputs.add(name=output.name, datatype=datatype, shape=values.shape)
            response.raw_output_contents.append(to_raw(values, datatype))
        for subject, text in outcome.remarks.items():
            response.parameters[subject].string_param = text
        return Answer(200, response.SerializeToString(), PROTOBUF)


def _typed(name: str, tensor: Any, shape: list[int]) -> NDArray[Any]:
    """A tensor whose values are in ``contents``."""
    checked_shape(name, tensor.datatype, shape)
    field = _CONTENTS.get(tensor.datatype)
    if field is None:
        raise InputError(
            f"tensor {name!r}: {tensor.datatype} has no typed contents: send raw_input_contents"
        )
    values: Any = list(getattr(tensor.contents, field))
    if field == "bytes_contents":
        lengths = [len(value).to_bytes(4, "little") + value for value in values]
        return from_raw(name, "BYTES", shape, memoryview(b"".join(lengths)))
    return from_json(name, tensor.datatype, shape, values, may_hold_bools=False)


def _parameters(given: Mapping[str, pb.InferParameter]) -> dict[str, Any]:
    """Parameters as plain values."""
    plain = {}
    for name, parameter in given.items():
        choice = parameter.WhichOneof("parameter_choice")
        if choice is not None:
            plain[name] = getattr(parameter, choice)
    return plain


def _server_metadata(version: str) -> Message:
    return pb.ServerMetadataResponse(name="twinpath", version=version, extensions=EXTENSIONS)


def model_metadata(plane: DataPlane) -> Message:
    """ModelMetadataResponse."""
    return ParseDict(metadata(plane), pb.ModelMetadataResponse())


def model_statistics(plane: DataPlane) -> Message:
    """ModelStatisticsResponse."""
    stats = plane.statistics.as_dict(plane.name, plane.version)
    return ParseDict({"model_stats": [stats]}, pb.ModelStatisticsResponse())


def model_config(plane: DataPlane) -> Message:
    """ModelConfigResponse: name, tensors and batch size, as Triton's tools read it."""
    config = pb.ModelConfig(
        name=plane.name,
        platform="twinpath",
        backend="twinpath",
        max_batch_size=plane.plan.placement.batch.max_size,
    )
    for name, kind in plane.metadata.inputs.items():
        config.input.add(name=name, data_type=_config_type(kind), dims=kind.shape or (1,))
    for name, kind in plane.metadata.outputs.items():
        config.output.add(name=name, data_type=_config_type(kind), dims=kind.shape or (1,))
    return pb.ModelConfigResponse(config=config)


def _config_type(kind: Any) -> Any:
    name = datatype_of(kind)
    return pb.DataType.Value("TYPE_STRING" if name == "BYTES" else f"TYPE_{name}")


async def _ready(plane: DataPlane) -> bool:
    return not await plane.ready()


async def answer(plane: DataPlane, method: str, message: Any, version: str) -> Message:
    """The answer to every method but inference. Raises UnknownModelError."""
    if hasattr(message, "model_name"):
        plane.find(message.model_name)
    elif getattr(message, "name", ""):
        plane.find(message.name, message.version or None)
    match method:
        case "ServerLive":
            return pb.ServerLiveResponse(live=True)
        case "ServerReady":
            return pb.ServerReadyResponse(ready=await _ready(plane))
        case "ModelReady":
            return pb.ModelReadyResponse(ready=await _ready(plane))
        case "ServerMetadata":
            return _server_metadata(version)
        case "RepositoryModelLoad":
            await plane.switch(True)
            return pb.RepositoryModelLoadResponse()
        case "RepositoryModelUnload":
            await plane.switch(False)
            return pb.RepositoryModelUnloadResponse()
        case "RepositoryIndex":
            missing = await plane.ready()
            state = "UNAVAILABLE" if missing else "READY"
            index = pb.RepositoryIndexResponse()
            if not (message.ready and missing):
                index.models.add(
                    name=plane.name, version=plane.version, state=state, reason=", ".join(missing)
                )
            return index
    described: dict[str, Callable[[DataPlane], Message]] = {
        "ModelMetadata": model_metadata,
        "ModelStatistics": model_statistics,
        "ModelConfig": model_config,
    }
    return described[method](plane)
