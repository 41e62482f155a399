"""MLServer's codecs over REST, and its gRPC stubs:  python mlserver_client.py HTTP GRPC"""

import asyncio
import sys

import aiohttp
import grpc
import numpy as np
from every_dtype import TEXT, rows
from mlserver.codecs import NumpyCodec, StringCodec
from mlserver.grpc import converters
from mlserver.grpc import dataplane_pb2 as pb
from mlserver.grpc import dataplane_pb2_grpc as pb_grpc
from mlserver.types import InferenceRequest, InferenceResponse, MetadataModelResponse

HTTP, GRPC = sys.argv[1:3]
METADATA = (("application", "wide"),)


def request():
    inputs = [NumpyCodec.encode_input(name, values) for name, values in rows().items()]
    inputs.append(StringCodec.encode_input("BYTES", TEXT.tolist(), use_bytes=False))
    return InferenceRequest(id="mine", inputs=inputs)


def same(response):
    assert response.id == "mine"
    assert len(response.outputs) >= 10
    for output in response.outputs:
        if output.name == "BYTES":
            assert StringCodec.decode_output(output) == TEXT.tolist()
            continue
        wanted = rows()[output.name]
        found = NumpyCodec.decode_output(output)
        assert found.astype(wanted.dtype).tobytes() == wanted.tobytes(), (output.name, found)


async def main():
    async with aiohttp.ClientSession() as session:
        base = f"http://{HTTP}/wide/v2/models/wide"
        async with session.get(base) as answer:
            known = MetadataModelResponse.model_validate(await answer.json())
            assert known.name == "wide"
        body = request().model_dump_json(exclude_none=True)
        async with session.post(f"{base}/infer", data=body) as answer:
            assert answer.status == 200, await answer.text()
            same(InferenceResponse.model_validate(await answer.json()))

    async with grpc.aio.insecure_channel(GRPC) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        live = await stub.ServerLive(pb.ServerLiveRequest(), metadata=METADATA)
        assert live.live
        # The smaller graph: MLServer's gRPC converter has no place for FP16.
        x = NumpyCodec.encode_input("x", np.array([[1, 9, 3, 4]], np.float32))
        message = converters.ModelInferRequestConverter.from_types(
            InferenceRequest(inputs=[x]), model_name="scores", model_version="1"
        )
        answer = await stub.ModelInfer(message, metadata=(("application", "scores"),))
        found = converters.ModelInferResponseConverter.to_types(answer)
        assert NumpyCodec.decode_output(found.outputs[0]).tolist() == [[2, 18, 6, 8]]


asyncio.run(main())
sys.stdout.write("all of mlserver\n")
