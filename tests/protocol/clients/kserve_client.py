"""KServe's REST and gRPC clients:  python kserve_client.py HTTP GRPC"""

import asyncio
import sys

from every_dtype import TEXT, rows
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig

HTTP, GRPC = sys.argv[1:3]


def request(binary, skip=()):
    inputs = []
    for name, values in {**rows(), "BYTES": TEXT}.items():
        if name in skip:
            continue
        tensor = InferInput(name, list(values.shape), name)
        tensor.set_data_from_numpy(values, binary_data=binary)
        inputs.append(tensor)
    return InferRequest("wide", inputs, request_id="mine")


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
    same(await rest.infer(base, request(True), model_name="wide"))
    v1 = InferenceRESTClient(RESTConfig(protocol="v1", timeout=30))
    answer = await v1.infer(
        f"http://{HTTP}/scores", {"instances": [[1, 9, 3, 4]]}, model_name="scores"
    )
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
