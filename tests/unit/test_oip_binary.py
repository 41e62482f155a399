"""Binary requests whose JSON came before are read from memory, and answered just the same."""

import json
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import BaseModel

from twinpath import Columns, Graph, Node
from twinpath.errors import InputError, MalformedBodyError, TwinpathError
from twinpath.graph.placement import Batch
from twinpath.graph.stage import Executor
from twinpath.graph.tensors import Tensor
from twinpath.online.app import graph_app
from twinpath.online.batcher import Batcher
from twinpath.online.dataplane import DataPlane
from twinpath.online.exchange import Answer, Call, Request
from twinpath.online.protocols import oip_binary
from twinpath.online.protocols.oip_rest import InferCodec

LENGTH = b"inference-header-content-length"


class Pair(BaseModel):
    a: Annotated[NDArray[Any], Tensor("float32[2]")]
    b: Annotated[NDArray[Any], Tensor("int64[1]")]


class Sums(BaseModel):
    total: float
    b: Annotated[NDArray[Any], Tensor("int64[1]")]


class Add(Node):
    inputs = {"a": "float32[2]"}
    outputs = {"total": "float64"}

    def predict(self, columns: Columns) -> Columns:
        return {"total": columns["a"].astype(np.float64).sum(axis=1)}


def made() -> tuple[DataPlane, Executor]:
    graph = Graph("pair", input=Pair, output=Sums)
    with graph as row:
        graph.output(row, Add()(row))
    executor = Executor(graph.plan)
    executor.setup()
    app = graph_app(graph.plan, Batcher(executor.run, Batch()), max_body_bytes=1 << 20)
    return app.frontend.plane, executor


PLANE, RUNNER = made()
SHARED = InferCodec(PLANE)


def binary(n: int, seed: int, **more: Any) -> Request:
    """A request for ``n`` rows; ``more`` goes into its JSON."""
    rng = np.random.default_rng(seed)
    tensors = {
        "a": ("FP32", rng.normal(size=(n, 2)).astype("<f4")),
        "b": ("INT64", rng.integers(-(2**60), 2**60, size=(n, 1)).astype("<i8")),
    }
    inputs = [
        {"name": name, "datatype": datatype, "shape": list(values.shape),
         "parameters": {"binary_data_size": values.nbytes}}
        for name, (datatype, values) in tensors.items()
    ]  # fmt: skip
    head = json.dumps({"inputs": inputs, **more}).encode()
    tail = b"".join(values.tobytes() for _, values in tensors.values())
    return with_length(head, head + tail)


def with_length(head: bytes, body: bytes, headers: Mapping[bytes, bytes] | None = None) -> Request:
    given = {LENGTH: str(len(head)).encode(), **(headers or {})}
    return Request("/v2/models/pair/infer", b"", given, body)


async def answered(codec: InferCodec, request: Request) -> Answer:
    try:
        call = codec.decode(request)
        assert isinstance(call, Call)
        return call.encode(await RUNNER.run(call.columns))
    except TwinpathError as error:
        return codec.refuse(error)


OUTPUTS = [
    {},
    {"parameters": {"binary_data_output": True}},
    {"outputs": [{"name": "total", "parameters": {"binary_data": True}}]},
    {"outputs": [{"name": "b", "parameters": {"binary_data": True}}, {"name": "total"}]},
    {"outputs": [{"name": "b", "parameters": {"classification": 1}}]},
    {"id": "mine", "parameters": {"binary_data_output": True}},
]
asked = st.tuples(st.integers(1, 3), st.integers(0, 5), st.sampled_from(OUTPUTS))


@settings(max_examples=40, deadline=None)
@given(st.lists(asked, min_size=2, max_size=8))
async def test_a_codec_that_has_seen_a_head_answers_like_one_that_has_not(
    requests: list[tuple[int, int, dict[str, Any]]],
):
    for n, seed, more in requests:
        request = binary(n, seed, **more)
        assert await answered(SHARED, request) == await answered(InferCodec(PLANE), request)


async def test_the_second_request_is_read_from_memory_and_without_a_copy():
    codec = InferCodec(PLANE)
    first, second = binary(2, 1), binary(2, 2)
    codec.decode(first)
    head = first.body[: int(first.headers[LENGTH])]
    known = codec._before.find(head) if codec._before is not None else None
    assert known is not None
    call = codec.decode(second)
    assert isinstance(call, Call)
    assert call.encode == known.encode
    values = call.columns["a"]
    assert not values.flags.writeable
    assert values.tobytes() == second.body[len(head) : len(head) + values.nbytes]


async def test_what_the_head_asks_for_beside_tensors_is_kept():
    codec = InferCodec(PLANE)
    request = binary(1, 1, parameters={"timeout": 5_000_000, "priority": 1})
    first, second = codec.decode(request), codec.decode(request)
    assert isinstance(first, Call)
    assert isinstance(second, Call)
    assert (first.timeout_s, first.priority) == (second.timeout_s, second.priority)
    assert second.timeout_s == 5.0


@pytest.mark.parametrize("cut", [1, 4, 12])
async def test_a_known_head_with_too_few_or_too_many_bytes_is_refused(cut: int):
    codec = InferCodec(PLANE)
    whole = binary(1, 1)
    size = int(whole.headers[LENGTH])
    assert (await answered(codec, whole)).status == 200
    for body in (whole.body[:-cut], whole.body + b"x" * cut):
        refused = await answered(codec, with_length(whole.body[:size], body))
        assert refused.status == 422, refused.body


@pytest.mark.parametrize("length", [b"-1", b"9" * 5000, b"999999999999999", b"1e3", b""])
async def test_a_length_that_is_none_is_refused_before_and_after_the_head_is_known(length: bytes):
    codec = InferCodec(PLANE)
    whole = binary(1, 1)
    for _ in range(2):
        bad = with_length(b"", whole.body, {LENGTH: length})
        with pytest.raises(MalformedBodyError):
            codec.decode(bad)
        assert (await answered(codec, whole)).status == 200


@pytest.mark.parametrize("a", ["[true, 1.5]", "[1.5, false]", "[[true], [1]]"])
@pytest.mark.parametrize("b", ["[1]", "[true]"])
async def test_a_boolean_in_json_is_no_number(a: str, b: str):
    """Python would take it for one."""
    body = (
        f'{{"inputs": [{{"name": "a", "datatype": "FP32", "shape": [1, 2], "data": {a}}},'
        f'{{"name": "b", "datatype": "INT64", "shape": [1, 1], "data": {b}}}]}}'
    )
    with pytest.raises(InputError, match="does not hold FP32 values"):
        SHARED.decode(Request("/v2/models/pair/infer", b"", {}, body.encode()))
    good = body.replace("true", "1").replace("false", "0")
    assert (await answered(SHARED, Request("", b"", {}, good.encode()))).status == 200


async def test_heads_that_never_come_again_take_no_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(oip_binary, "_BOUND", 4)
    codec = InferCodec(PLANE)
    assert codec._before is not None
    for n in range(1, 40):
        assert (await answered(codec, binary(n, n))).status == 200
        assert len(codec._before._known) <= 4
    for n in range(50):
        codec.decode(binary(1, 1, id=f"request {n}"))
    assert len(codec._before._known) <= 4
