"""What gRPC tools expect of a server: the standard health service, reflection, deadlines."""

from collections.abc import Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from twinpath.online.protocols import oip_pb2 as pb
from twinpath.online.session import ServeSession

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]
TO_SCORES = (("application", "scores"),)


@pytest.fixture
def channel(session: ServeSession) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{session.grpc_port}") as opened:
        yield opened


def infer(channel: grpc.Channel, x: list[float], **more: object) -> pb.ModelInferResponse:
    request = pb.ModelInferRequest(model_name="scores")
    tensor = request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    tensor.contents.fp32_contents.extend(x)
    call = channel.unary_unary(
        "/inference.GRPCInferenceService/ModelInfer",
        request_serializer=pb.ModelInferRequest.SerializeToString,
        response_deserializer=pb.ModelInferResponse.FromString,
    )
    return call(request, metadata=TO_SCORES, **more)


def test_the_standard_health_service_answers(channel: grpc.Channel):
    health = health_pb2_grpc.HealthStub(channel)
    for service in ("", "inference.GRPCInferenceService"):
        request = health_pb2.HealthCheckRequest(service=service)
        answer = health.Check(request, metadata=TO_SCORES)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as refused:
        health.Check(health_pb2.HealthCheckRequest(service="other"), metadata=TO_SCORES)
    assert refused.value.code() == grpc.StatusCode.NOT_FOUND


def test_reflection_lists_the_service(channel: grpc.Channel):
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    [answer] = stub.ServerReflectionInfo(asked, metadata=TO_SCORES)
    names = {service.name for service in answer.list_services_response.service}
    assert {"inference.GRPCInferenceService", "grpc.health.v1.Health"} <= names


def test_typed_contents_are_read(channel: grpc.Channel):
    answer = infer(channel, [1, 9, 3, 4])
    assert [output.name for output in answer.outputs] == ["scores", "best"]
    assert answer.raw_output_contents[1] == (1).to_bytes(8, "little")


@pytest.mark.parametrize(
    ("x", "code", "says"),
    [
        ([1, 2], grpc.StatusCode.INVALID_ARGUMENT, "needs 4 values, data has 2"),
        ([13, 0, 0, 0], grpc.StatusCode.INVALID_ARGUMENT, "thirteen"),
    ],
)
def test_errors_have_the_right_code_and_say_why(
    channel: grpc.Channel, x: list[float], code: grpc.StatusCode, says: str
):
    with pytest.raises(grpc.RpcError) as refused:
        infer(channel, x)
    assert refused.value.code() == code
    assert says in refused.value.details()


def test_a_deadline_that_is_over_is_kept(channel: grpc.Channel):
    """No time at all is a millisecond on the wire, in which a call may yet be answered."""
    codes = []
    for _ in range(100):
        try:
            infer(channel, [1, 2, 3, 4], timeout=1e-9)
        except grpc.RpcError as late:
            codes.append(late.code())
    assert len(codes) > 10
    assert set(codes) == {grpc.StatusCode.DEADLINE_EXCEEDED}
