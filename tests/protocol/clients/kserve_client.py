"""KServe's REST and gRPC clients:  python kserve_client.py HTTP GRPC"""

import asyncio
import sys

import numpy as np
from every_dtype import TEXT, rows
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.protocol.infer_type import RequestedOutput

HTTP, GRPC = sys.argv[1:3]


def request(binary, skip=()):
    """Two rows of every datatype; FP16, which the client does not send as JSON, is binary ever."""
    inputs = []
    for name, values in {**rows(), "BYTES": TEXT}.items():
        if name in skip:
            continue
        tensor = InferInput(name, list(values.shape), name)
        tensor.set_data_from_numpy(values, binary_data=binary or name == "FP16")
        inputs.append(tensor)
    return InferRequest("wide", inputs, request_id="mine")


def scores(binary, **more):
    x = InferInput("x", [1, 4], "FP32")
    x.set_data_from_numpy(np.array([[1, 9, 3, 4]], np.float32), binary_data=binary)
    return InferRequest("scores", [x], request_id="mine", **more)


def same(response):
    assert response.id == "mine"
    assert len(response.outputs) >= 10
    for output in response.outputs:
        found = output.as_numpy()
        if output.name == "BYTES":
            texts = [t.decode() if isinstance(t, bytes) else t for t in found.tolist()]
            assert texts == TEXT.tolist(), texts
        else:
            wanted = rows()[output.name]
            assert found.astype(wanted.dtype).tobytes() == wanted.tobytes(), (output.name, found)


async def main():
    rest = InferenceRESTClient(RESTConfig(protocol="v2", timeout=30))
    base = f"http://{HTTP}/wide"
    assert await rest.is_server_live(base)
    assert await rest.is_server_ready(base)
    assert await rest.is_model_ready(base, "wide")
    # One body of JSON and binary tensors; then JSON alone, in and out; then a plain dictionary.
    same(await rest.infer(base, request(True), model_name="wide"))
    same(await rest.infer(base, request(False), model_name="wide"))
    of_scores = f"http://{HTTP}/scores"
    for asked in (scores(False), scores(False).to_rest()[0]):
        answer = await rest.infer(of_scores, asked, model_name="scores")
        assert answer.id == "mine"
        assert [output.name for output in answer.outputs] == ["scores", "best"]
        assert answer.outputs[0].data == [2.0, 18.0, 6.0, 8.0], answer.outputs[0].data
        assert answer.outputs[1].data == [1], answer.outputs[1].data
    wanted = [RequestedOutput("best", {"binary_data": True})]
    asked = scores(False, request_outputs=wanted)
    answer = await rest.infer(of_scores, asked, model_name="scores")
    assert [output.as_numpy().tolist() for output in answer.outputs] == [[1]]
    try:
        await rest.infer(of_scores, scores(False), model_name="score")
    except Exception as error:
        assert "404" in str(error), error
        assert "scores" in str(error), error
    else:
        raise AssertionError("a model that is not here answered")

    v1 = InferenceRESTClient(RESTConfig(protocol="v1", timeout=30))
    assert await v1.is_server_live(of_scores)
    assert await v1.is_model_ready(of_scores, "scores")
    answer = await v1.infer(of_scores, {"instances": [[1, 9, 3, 4]]}, model_name="scores")
    assert answer["predictions"][0]["best"] == 1, answer
    await rest.close()
    await v1.close()

    async with InferenceGRPCClient(GRPC) as grpc:
        headers = (("application", "wide"),)
        assert await grpc.is_server_ready(headers=headers)
        assert await grpc.is_model_ready("wide", headers=headers)
        same(await grpc.infer(request(True), headers=headers))
        try:
            await grpc.infer(request(True, skip=["FP32"]), headers=headers)
        except Exception as error:
            assert "FP32" in str(error), error
        else:
            raise AssertionError("a request without an input was answered")


asyncio.run(main())
sys.stdout.write("all of kserve\n")
