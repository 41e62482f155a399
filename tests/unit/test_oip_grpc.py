"""Messages of the Open Inference Protocol: whatever they hold, an answer or our own error."""

import pickle
from typing import Annotated, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import BaseModel

from twinpath import Batch, Columns, Graph, Node, Tensor
from twinpath.errors import (
    GRPC_STATUS,
    InputError,
    TwinpathError,
    http_status_of,
)
from twinpath.graph.columns import Outcome, row_count
from twinpath.graph.stage import Executor
from twinpath.online.app import graph_app
from twinpath.online.batcher import Batcher
from twinpath.online.exchange import Answer, Call, Request
from twinpath.online.oip_service import OipService, _Refused, status_of
from twinpath.online.protocols import oip_pb2 as pb
from twinpath.online.protocols.oip_grpc import GrpcCodec, answer
from twinpath.online.protocols.oip_rest import InferCodec
from twinpath.online.protocols.oip_tensors import NUMPY


class Row(BaseModel):
    x: Annotated[NDArray[Any], Tensor("float32[2]")]
    name: str = ""


class Sum(BaseModel):
    total: float
    name: str


class Add(Node):
    inputs, outputs = {"x": "float32[2]"}, {"total": "float64"}

    def predict(self, columns: Columns) -> Columns:
        return {"total": columns["x"].sum(1, dtype=np.float64)}


def frontend() -> Any:
    graph = Graph("sums", input=Row, output=Sum)
    with graph as rows:
        graph.output(Add()(rows))
    executor = Executor(graph.plan)
    executor.setup()
    return graph_app(graph.plan, Batcher(executor.run, Batch()), max_body_bytes=1000).frontend


PLANE = frontend().plane
REST = InferCodec(PLANE)
ASKED = Request("", b"", {}, b"")


def decode(message: pb.ModelInferRequest) -> Call:
    call = GrpcCodec(PLANE, REST, message).decode(ASKED)
    assert isinstance(call, Call)
    return call


def request(**more: Any) -> pb.ModelInferRequest:
    made = pb.ModelInferRequest(model_name="sums", **more)
    tensor = made.inputs.add(name="x", datatype="FP32", shape=[2, 2])
    tensor.contents.fp32_contents.extend([1, 2, 3, 4])
    return made


def test_typed_and_raw_contents_are_the_same_columns():
    raw = pb.ModelInferRequest(model_name="sums", model_version="1")
    raw.inputs.add(name="x", datatype="FP32", shape=[2, 2])
    raw.raw_input_contents.append(np.array([1, 2, 3, 4], "<f4").tobytes())
    for message in (request(), raw):
        assert decode(message).columns["x"].tolist() == [[1, 2], [3, 4]]


def test_parameters_of_a_request_are_read():
    message = request()
    message.parameters["timeout"].int64_param = 2_000_000
    message.parameters["priority"].uint64_param = 1
    call = decode(message)
    assert (call.timeout_s, call.priority) == (2.0, 2)


def test_what_a_node_says_of_an_answer_is_a_parameter_of_it():
    call = decode(request())
    outcome = Outcome.success({"total": np.zeros(2), "name": np.array(["", ""], object)}, 2)
    assert not pb.ModelInferResponse.FromString(call.encode(outcome).body).parameters
    outcome.remarks = {"features": "degraded"}
    marked = pb.ModelInferResponse.FromString(call.encode(outcome).body)
    assert marked.parameters["features"].string_param == "degraded"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_name": "sum"}, "Did you mean 'sums'"),
        ({"model_version": "7"}, "no version '7'"),
        ({"raw_input_contents": [b"", b""]}, "2 raw_input_contents for 1 inputs"),
    ],
)
def test_bad_messages_are_refused_with_what_was_expected(change: dict[str, Any], says: str):
    message = request()
    for name, value in change.items():
        if isinstance(value, list):
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    with pytest.raises(TwinpathError, match=says):
        decode(message)


async def test_a_message_over_the_limit_is_refused_as_a_body_is():
    service = OipService(frontend())

    def ask(message: pb.ModelInferRequest) -> Any:
        return service.ask("ModelInfer", (), "ipv4:127.0.0.1:1", None, message.ByteSize())

    small = request()
    assert pb.ModelInferResponse.FromString(await service.infer(small, ask(small))).outputs
    large = request()
    large.parameters["note"].string_param = "n" * 1000
    with pytest.raises(TwinpathError, match=r"has 10\d\d bytes, and the limit is 1000") as refused:
        await service.infer(large, ask(large))
    assert status_of(refused.value).name == "RESOURCE_EXHAUSTED"


def test_types_without_a_typed_field_have_to_be_raw():
    message = pb.ModelInferRequest(model_name="sums")
    message.inputs.add(name="x", datatype="FP16", shape=[1, 2])
    with pytest.raises(InputError, match="send raw_input_contents"):
        decode(message)


def test_every_error_has_a_grpc_status():
    for code in ("invalid_input", "unauthenticated", "overloaded", "deadline_exceeded"):
        assert http_status_of(code) in GRPC_STATUS
    assert status_of(InputError("x")).name == "INVALID_ARGUMENT"


async def test_the_model_describes_itself():
    known = await answer(PLANE, "ModelMetadata", pb.ModelMetadataRequest(name="sums"), "1")
    assert [(t.name, t.datatype, list(t.shape)) for t in known.inputs] == [
        ("x", "FP32", [-1, 2]), ("name", "BYTES", [-1]),
    ]  # fmt: skip
    config = await answer(PLANE, "ModelConfig", pb.ModelConfigRequest(name="sums"), "1")
    assert config.config.output[0].data_type == pb.TYPE_FP64
    with pytest.raises(TwinpathError, match="no model 'other'"):
        await answer(PLANE, "ModelReady", pb.ModelReadyRequest(name="other"), "1")


tensors = st.builds(
    pb.ModelInferRequest.InferInputTensor,
    name=st.sampled_from(["x", "name", "y"]),
    datatype=st.sampled_from([*NUMPY, "", "FP33"]),
    shape=st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 3), max_size=4),
    contents=st.builds(
        pb.InferTensorContents,
        fp32_contents=st.lists(st.floats(width=32), max_size=6),
        int_contents=st.lists(st.integers(-(2**31), 2**31 - 1), max_size=6),
        uint64_contents=st.lists(st.integers(0, 2**64 - 1), max_size=6),
        uint_contents=st.lists(st.integers(0, 2**32 - 1), max_size=6),
        int64_contents=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=6),
        fp64_contents=st.lists(st.floats(), max_size=6),
        bool_contents=st.lists(st.booleans(), max_size=6),
        bytes_contents=st.lists(st.binary(max_size=4), max_size=4),
    ),
)


parameters = st.dictionaries(
    st.sampled_from(["timeout", "priority", "classification", "binary_data", "other"]),
    st.builds(pb.InferParameter, bool_param=st.booleans())
    | st.builds(pb.InferParameter, int64_param=st.integers(-(2**63), 2**63 - 1))
    | st.builds(pb.InferParameter, uint64_param=st.integers(0, 2**64 - 1))
    | st.builds(pb.InferParameter, double_param=st.floats())
    | st.builds(pb.InferParameter, string_param=st.text(max_size=4)),
    max_size=3,
)
outputs = st.builds(
    pb.ModelInferRequest.InferRequestedOutputTensor,
    name=st.sampled_from(["total", "name", "y", ""]),
    parameters=parameters,
)


@settings(max_examples=500, deadline=None)
@given(
    st.lists(tensors, max_size=3),
    st.lists(st.binary(max_size=20), max_size=3),
    st.lists(outputs, max_size=3),
    parameters,
)
def test_nothing_but_our_own_errors_whatever_a_message_holds(
    given_tensors: Any, raw: list[bytes], wanted: Any, more: Any
):
    message = pb.ModelInferRequest(
        model_name="sums",
        inputs=given_tensors,
        raw_input_contents=raw,
        outputs=wanted,
        parameters=more,
    )
    status = 400
    try:
        call = decode(pb.ModelInferRequest.FromString(message.SerializeToString()))
        n = row_count(call.columns)
        total = {"total": np.zeros(n), "name": np.full(n, "", object)}
        call.encode(Outcome.success(total, n))
    except TwinpathError as error:
        status = error.http_status
    assert 400 <= status < 500


def test_a_refusal_survives_the_way_to_another_process():
    """From a replica to Serve's gRPC proxy, which reads its text."""
    answer = Answer(429, b"enough", headers=[(b"retry-after", b"7")])
    found = pickle.loads(pickle.dumps(_Refused(answer)))
    assert (found.message, found.http_status) == ("enough", 429)
    assert found.trailers == [("retry-after", "7")]
