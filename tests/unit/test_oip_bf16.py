"""BF16 in and out of an endpoint, over REST and gRPC, compared bit by bit."""

import json
from typing import Annotated, Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import BaseModel

from twinpath import Batch, Columns, Graph, Node, Tensor
from twinpath.errors import GraphError
from twinpath.graph.dtypes import ColumnType
from twinpath.graph.stage import Executor
from twinpath.online.app import GraphApp, graph_app
from twinpath.online.batcher import Batcher
from twinpath.online.oip_service import OipService
from twinpath.online.protocols import oip_pb2 as pb

#: Every pattern of bits but those of NaN, in rows of four.
BITS = np.arange(1 << 16, dtype=np.uint32)
BITS = BITS[(BITS & 0x7FFF) <= 0x7F80][:65024].reshape(-1, 4)
SAME = BITS.astype("<u2").tobytes()


class Halves(BaseModel):
    x: Annotated[NDArray[Any], Tensor("bfloat16[4]")]
    wide: Annotated[NDArray[Any], Tensor("float32[4]")]


class Answer(BaseModel):
    x: Annotated[NDArray[Any], Tensor("bfloat16[4]")]
    wide: Annotated[NDArray[Any], Tensor("float32[4]")]
    third: Annotated[NDArray[Any], Tensor("bfloat16[4]")]


class Third(Node):
    inputs, outputs = {"x": "bfloat16[4]"}, {"third": "bfloat16[4]"}

    def predict(self, columns: Columns) -> Columns:
        assert columns["x"].dtype == np.float32
        return {"third": columns["x"] / np.float32(3)}


class Single(BaseModel):
    wide: Annotated[NDArray[Any], Tensor("float32[4]")]


class Half(BaseModel):
    x: Annotated[NDArray[Any], Tensor("bfloat16[4]")]


class Round(Node):
    inputs, outputs = {"wide": "float32[4]"}, {"x": "bfloat16[4]"}

    def predict(self, columns: Columns) -> Columns:
        return {"x": columns["wide"]}


class Keep(Node):
    """Does not say that it rounds."""

    inputs, outputs = {"wide": "float32[4]"}, {"x": "float32[4]"}

    def predict(self, columns: Columns) -> Columns:
        return {"x": columns["wide"]}


@pytest.fixture(scope="module")
def app() -> GraphApp:
    return app_of(Halves, Answer, Third())


def app_of(given: type[BaseModel], answer: type[BaseModel], node: Node) -> GraphApp:
    graph = Graph("halves", input=given, output=answer)
    with graph as rows:
        graph.output(node(rows))
    executor = Executor(graph.plan)
    executor.setup()
    return graph_app(graph.plan, Batcher(executor.run, Batch()), max_body_bytes=1 << 20)


def checked(found: dict[str, bytes]) -> None:
    """The same bits came back, widened where the column is wider, and the nearest third."""
    assert found["x"] == SAME
    assert found["wide"] == (BITS << 16).astype("<u4").tobytes()
    exact = (BITS << 16).astype(np.uint32).view(np.float32) / np.float32(3)
    third = (np.frombuffer(found["third"], "<u2").astype(np.uint32) << 16).view(np.float32)
    normal = np.isfinite(exact.ravel()) & (np.abs(exact.ravel()) > 2e-38)
    error = np.abs(third[normal] / exact.ravel()[normal] - 1)
    assert error.max() <= 2.0**-8
    assert np.array_equal(np.isinf(third), np.isinf(exact.ravel()))


@pytest.mark.parametrize(
    ("wide_as", "wide"), [("BF16", SAME), ("FP32", (BITS << 16).astype("<u4").tobytes())]
)
async def test_bits_are_kept_over_rest(app: GraphApp, wide_as: str, wide: bytes):
    inputs = [
        {
            "name": name, "datatype": datatype, "shape": list(BITS.shape),
            "parameters": {"binary_data_size": len(raw)},
        }
        for name, datatype, raw in (("x", "BF16", SAME), ("wide", wide_as, wide))
    ]  # fmt: skip
    document: dict[str, Any] = {"inputs": inputs, "parameters": {"binary_data_output": True}}
    head = json.dumps(document).encode()
    headers = {
        "inference-header-content-length": str(len(head)),
        "accept-encoding": "identity",  # heads are remembered of requests that want it plain
    }
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        for _ in range(3):  # the second may be read and answered from memory
            answer = await client.post(
                "/v2/models/halves/infer", content=head + SAME + wide, headers=headers
            )
            assert answer.status_code == 200, answer.text
            at = int(answer.headers["inference-header-content-length"])
            found, told = {}, json.loads(answer.content[:at])
            for output in told["outputs"]:
                assert output["datatype"] == ("FP32" if output["name"] == "wide" else "BF16")
                end = at + output["parameters"]["binary_data_size"]
                found[output["name"]] = answer.content[at:end]
                at = end
            assert at == len(answer.content)
            checked(found)
        known = (await client.get("/v2/models/halves")).json()
        assert [tensor["datatype"] for tensor in known["inputs"]] == ["BF16", "FP32"]
        config = (await client.get("/v1/models/halves/metadata")).json()
    signature = config["metadata"]["signature_def"]["signature_def"]["serving_default"]
    assert signature["inputs"]["x"]["dtype"] == "DT_BFLOAT16"


async def test_an_answer_is_rounded_to_the_nearest_where_only_that_is_bf16():
    values = np.array([[1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20]], "<f4")
    nearest = np.array([0x3F80, 0x3F80, 0x3F82, 0x3F81], "<u2").tobytes()  # ties to even
    wide = {"name": "wide", "datatype": "FP32", "shape": [1, 4]}
    document = {
        "inputs": [wide | {"parameters": {"binary_data_size": 16}}],
        "parameters": {"binary_data_output": True},
    }
    head = json.dumps(document).encode()
    headers = {
        "inference-header-content-length": str(len(head)), "accept-encoding": "identity",
    }  # fmt: skip
    transport = httpx.ASGITransport(app_of(Single, Half, Round()))
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        for _ in range(3):
            answer = await client.post(
                "/v2/models/halves/infer", content=head + values.tobytes(), headers=headers
            )
            at = int(answer.headers["inference-header-content-length"])
            assert answer.content[at:] == nearest


async def test_bits_are_kept_over_grpc(app: GraphApp):
    service = OipService(app.frontend)
    message = pb.ModelInferRequest(model_name="halves")
    for name in ("x", "wide"):
        message.inputs.add(name=name, datatype="BF16", shape=BITS.shape)
        message.raw_input_contents.append(SAME)
    ask = service.ask("ModelInfer", (), "", None, message.ByteSize())
    answer = pb.ModelInferResponse.FromString(await service.infer(message, ask))
    assert [o.datatype for o in answer.outputs] == ["BF16", "FP32", "BF16"]
    checked(dict(zip([o.name for o in answer.outputs], answer.raw_output_contents, strict=True)))
    config = await service.other("ModelConfig", pb.ModelConfigRequest(name="halves"), ask)
    assert config.config.input[0].data_type == pb.TYPE_BF16


async def test_json_has_the_numbers_and_fp32_is_as_good(app: GraphApp):
    tensor = {"datatype": "FP32", "shape": [1, 4], "data": [1.0, -0.5, 3.0, 256.0]}
    inputs = [tensor | {"name": name} for name in ("x", "wide")]
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        answer = await client.post("/v2/models/halves/infer", json={"inputs": inputs})
        assert answer.json()["outputs"][0] == {
            "name": "x", "datatype": "BF16", "shape": [1, 4], "data": [1.0, -0.5, 3.0, 256.0],
        }  # fmt: skip
        rows = [{"x": [1, 2, 3, 4], "wide": [1, 2, 3, 4]}]
        typed = await client.post("/predict", json={"rows": rows})
        assert typed.json()["rows"][0]["x"] == [1.0, 2.0, 3.0, 4.0]


def test_nothing_becomes_a_bfloat16_unasked():
    half, single, double = (ColumnType(name) for name in ("bfloat16", "float32", "float64"))
    assert half.accepts(half)
    assert single.accepts(half)
    assert double.accepts(half)
    assert not half.accepts(single)
    assert not ColumnType("float16").accepts(half)
    assert np.isnan(half.gap())
    with pytest.raises(GraphError, match="bfloat16"):
        app_of(Single, Half, Keep())
