"""tritonclient, http and grpc, synchronous and asyncio:  python triton.py HTTP GRPC"""

import asyncio
import queue
import sys

import numpy as np
import tritonclient.grpc as tgrpc
import tritonclient.grpc.aio as tgrpc_aio
import tritonclient.http as thttp
import tritonclient.http.aio as thttp_aio
from every_dtype import TEXT, rows
from ml_dtypes import bfloat16

HTTP, GRPC = sys.argv[1:3]
META = {"application": "scores"}
WIDE = {"application": "wide"}


def wide_inputs(api, binary=None):
    made = []
    for name, values in {**rows(), "BYTES": TEXT}.items():
        tensor = api.InferInput(name, list(values.shape), name)
        more = {} if binary is None else {"binary_data": binary or name == "FP16"}
        tensor.set_data_from_numpy(values, **more)
        made.append(tensor)
    return made


def same(result):
    for name, values in rows().items():
        found = result.as_numpy(name)
        assert found.dtype == values.dtype, (name, found.dtype)
        assert found.tobytes() == values.tobytes(), (name, found)
    texts = [t.decode() if isinstance(t, bytes) else t for t in result.as_numpy("BYTES").tolist()]
    assert texts == TEXT.tolist(), texts


def halves(api):
    """Two rows in BF16, which the client takes as that type only."""
    values = np.array([[1.0, -0.0, np.inf, 3e38], [1e-40, np.nan, 2.0**-133, -65280]], bfloat16)
    tensor = api.InferInput("x", [2, 4], "BF16")
    tensor.set_data_from_numpy(values)
    return values, [tensor]


def same_bits(values, result):
    found = result.as_numpy("x")
    assert found.dtype == bfloat16, found.dtype
    assert found.tobytes() == values.tobytes(), (values, found)


def score_input(api, x=(1, 9, 3, 4)):
    tensor = api.InferInput("x", [1, 4], "FP32")
    tensor.set_data_from_numpy(np.array([x], np.float32))
    return [tensor]


def http():
    with thttp.InferenceServerClient(f"{HTTP}/wide") as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("wide")
        for binary_in in (True, False):
            for binary_out in (True, False):
                outputs = [
                    thttp.InferRequestedOutput(name, binary_data=binary_out or name == "FP16")
                    for name in [*rows(), "BYTES"]
                ]
                same(client.infer("wide", wide_inputs(thttp, binary_in), outputs=outputs))
        for algorithm in ("gzip", "deflate"):
            same(
                client.infer(
                    "wide",
                    wide_inputs(thttp, True),
                    request_compression_algorithm=algorithm,
                    response_compression_algorithm="gzip",
                )
            )
    with thttp.InferenceServerClient(f"{HTTP}/halves") as client:
        values, inputs = halves(thttp)
        for _ in range(3):
            same_bits(values, client.infer("halves", inputs))
    with thttp.InferenceServerClient(f"{HTTP}/scores", concurrency=4) as client:
        assert client.get_server_metadata()["name"] == "twinpath"
        assert client.get_model_metadata("scores", "1")["inputs"][0]["shape"] == [-1, 4]
        top = [thttp.InferRequestedOutput("scores", class_count=2)]
        found = client.infer("scores", score_input(thttp), outputs=top, request_id="mine")
        assert found.as_numpy("scores").tolist() == [[b"18.000000:1", b"8.000000:3"]]
        assert found.get_response()["id"] == "mine"
        waiting = [client.async_infer("scores", score_input(thttp)) for _ in range(20)]
        assert all(w.get_result().as_numpy("best").tolist() == [1] for w in waiting)
        stats = client.get_inference_statistics("scores")["model_stats"][0]
        assert stats["inference_count"] >= 21
        assert client.get_model_repository_index()[0]["state"] == "READY"
        for call in (
            lambda: client.infer("score", score_input(thttp)),
            lambda: client.infer("scores", score_input(thttp, (13, 0, 0, 0))),
            lambda: client.infer("scores", wide_inputs(thttp, True)),
        ):
            try:
                call()
            except Exception as error:
                assert "InferenceServerException" in type(error).__name__, error
                assert str(error), error
            else:
                raise AssertionError("a bad request was answered")
        client.unload_model("scores")
        assert not client.is_model_ready("scores")
        client.load_model("scores")
        assert client.is_model_ready("scores")


async def http_aio():
    async with thttp_aio.InferenceServerClient(f"{HTTP}/wide") as client:
        assert await client.is_model_ready("wide")
        same(await client.infer("wide", wide_inputs(thttp_aio, True)))


def grpc():
    with tgrpc.InferenceServerClient(GRPC) as client:
        assert client.is_server_live(WIDE)
        assert client.is_server_ready(WIDE)
        assert client.is_model_ready("wide", headers=WIDE)
        same(client.infer("wide", wide_inputs(tgrpc), headers=WIDE))
        same(client.infer("wide", wide_inputs(tgrpc), headers=WIDE, compression_algorithm="gzip"))
        values, inputs = halves(tgrpc)
        same_bits(values, client.infer("halves", inputs, headers={"application": "halves"}))
        metadata = client.get_model_metadata("scores", headers=META)
        assert list(metadata.inputs[0].shape) == [-1, 4]
        assert client.get_model_config("scores", headers=META).config.max_batch_size > 1
        assert client.get_model_repository_index(headers=META).models[0].state == "READY"
        assert client.get_server_metadata(headers=META).name == "twinpath"
        try:
            client.infer("scores", score_input(tgrpc, (13, 0, 0, 0)), headers=META)
        except Exception as error:
            assert "INVALID_ARGUMENT" in str(error), error
            assert "thirteen" in str(error), error
        else:
            raise AssertionError("a bad row was answered")
        answers = queue.Queue()
        client.start_stream(lambda result, error: answers.put((result, error)), headers=META)
        for i in range(20):
            x = (13, 0, 0, 0) if i == 7 else (i + 50, 0, 0, 0)
            client.async_stream_infer("scores", score_input(tgrpc, x), request_id=str(i))
        for i in range(20):
            result, error = answers.get(timeout=20)
            if i == 7:
                assert "thirteen" in str(error), error
            else:
                assert error is None, error
                assert result.get_response().id == str(i)
                assert result.as_numpy("scores")[0, 0] == 2 * (i + 50)
        client.stop_stream()
        stats = client.get_inference_statistics("scores", headers=META).model_stats[0]
        assert stats.inference_stats.success.count >= 19


async def grpc_aio():
    async with tgrpc_aio.InferenceServerClient(GRPC) as client:
        assert await client.is_model_ready("wide", headers=WIDE)
        same(await client.infer("wide", wide_inputs(tgrpc_aio), headers=WIDE))


http()
asyncio.run(http_aio())
grpc()
asyncio.run(grpc_aio())
sys.stdout.write("all of tritonclient\n")
