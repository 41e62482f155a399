"""A real vLLM engine as a node, in this process."""

import asyncio
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import uvicorn
from prometheus_client import REGISTRY
from safetensors.torch import load_file

from llm import models
from llm.conftest import ENGINE, ENVIRONMENT, ON_GPU
from twinpath.errors import ConfigError, InputError, MemoryPlanError, RetryLaterError, TwinpathError
from twinpath.graph.columns import ROW_ERROR, Columns
from twinpath.graph.placement import Batch
from twinpath.graph.streaming import StreamingExecutor
from twinpath.nodes import llm_frontend
from twinpath.nodes.llm import LLM, Classify, Embed, sampling_params
from twinpath.nodes.llm_admission import admit_in_groups
from twinpath.nodes.llm_memory import GIB, plan_node
from twinpath.nodes.llm_usage import USAGE, Usage
from twinpath.online.app import GraphApp, graph_app
from twinpath.online.batcher import Batcher
from twinpath.online.dataplane import Ask
from twinpath.online.exchange import Answer, Request
from twinpath.online.frontend import Exchange
from twinpath.online.gateway.args import GatewayArgs, LimitArgs
from twinpath.online.gateway.keys import new_key, write_keys
from twinpath.online.lean import LeanProtocol
from twinpath.online.oip_service import OipService, status_of
from twinpath.online.protocols import oip_pb2 as pb
from twinpath.online.protocols.generate_stream import stream_routes
from twinpath.online.protocols.openai import OpenAIDoor, engine_step

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def text(values: list[Any]) -> np.ndarray:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def rows(prompts: list[str], budget: int = 8, adapter: str = "") -> Columns:
    return {
        "prompt": text(prompts),
        "budget": np.full(len(prompts), budget),
        "adapter": text([adapter] * len(prompts)),
    }


async def until(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110  # the engine has no event for it
            await asyncio.sleep(0.001)


@pytest.fixture(scope="module")
def loop() -> Any:
    """One loop for all tests of the engine: an engine stays with the loop that it was used in."""
    with asyncio.Runner() as runner:
        yield runner


def test_texts_come_in_the_order_of_their_rows_with_their_counts(llm: LLM, loop: asyncio.Runner):
    prompts = models.prompts(40)
    together = loop.run(llm.predict(rows(prompts)))
    alone = [loop.run(llm.predict(rows([prompt]))) for prompt in prompts[::10]]
    assert together["text"][::10].tolist() == [part["text"][0] for part in alone]
    assert (together["completion_tokens"] <= 8).all()
    assert (together["completion_tokens"] > 0).all()
    tokens = [len(llm.engine.get_tokenizer().encode(prompt)) for prompt in prompts]
    assert together["prompt_tokens"].tolist() == tokens
    assert set(together["finish_reason"]) <= {"length", "stop"}


def test_a_column_can_give_a_sampling_parameter(llm: LLM, loop: asyncio.Runner):
    columns = rows(models.prompts(3)) | {"budget": np.array([1, 5, 9])}
    counts = loop.run(llm.predict(columns))["completion_tokens"]
    assert (counts <= [1, 5, 9]).all()
    assert counts[0] == 1


def test_a_row_that_the_engine_refuses_fails_alone(llm: LLM, loop: asyncio.Runner):
    columns = rows(["hello", "late " * 400, "", "hello"]) | {
        "adapter": text(["", "", "", "strang"])
    }
    answer = loop.run(llm.predict(columns))
    errors = answer[ROW_ERROR]
    assert errors[0] is None
    assert "maximum context length is 256" in errors[1].message
    assert "expected text, got ''" in errors[2].message
    assert "no adapter 'strang'. Did you mean 'strange'?" in errors[3].message
    assert answer["text"][0]


def test_an_adapter_is_chosen_by_row(llm: LLM, loop: asyncio.Runner):
    prompts = models.prompts(8)
    plain = loop.run(llm.predict(rows(prompts)))["text"]
    mixed = rows(prompts) | {"adapter": text(["", "strange"] * 4)}
    both = loop.run(llm.predict(mixed))["text"]
    assert both[::2].tolist() == plain[::2].tolist()
    assert (both[1::2] != plain[1::2]).any()


def test_a_stream_joins_to_the_same_text(llm: LLM, loop: asyncio.Runner):
    async def collect() -> list[Columns]:
        return [part async for part in llm.stream(rows(["why is my flight late"], budget=12))]

    parts = loop.run(collect())
    whole = loop.run(llm.predict(rows(["why is my flight late"], budget=12)))
    assert "".join(part["text"][0] for part in parts) == whole["text"][0]
    assert len(parts) > 2
    assert parts[-1]["completion_tokens"][0] == whole["completion_tokens"][0]
    assert parts[-1]["finish_reason"][0] == whole["finish_reason"][0]
    with pytest.raises(InputError, match="one row can be streamed at a time, got 2"):
        loop.run(anext(llm.stream(rows(["a", "b"]))))


def test_structured_outputs_hold_whatever_the_weights_say(llm: LLM, loop: asyncio.Runner):
    schema = {
        "type": "object",
        "properties": {"gate": {"enum": ["A1", "B2"]}, "late": {"type": "boolean"}},
        "required": ["gate", "late"],
        "additionalProperties": False,
    }
    columns = rows(["which gate", "hello", "flight"], budget=60)
    columns["shape"] = text([{"json": schema}, {"regex": r"[0-9]{3}"}, {"choice": ["yes", "no"]}])
    llm.by_row["structured_outputs"] = "shape"
    try:
        first, second, third = loop.run(llm.predict(columns))["text"]
    finally:
        del llm.by_row["structured_outputs"]
    assert set(json.loads(first)) == {"gate", "late"}
    assert len(second) == 3
    assert second.isdigit()
    assert third in ("yes", "no")


def test_chats_go_through_the_models_template(llm: LLM, loop: asyncio.Runner):
    chat = [{"role": "user", "content": "hello"}]
    columns = rows(["<|user|>hello</s><|assistant|>"] * 2)
    expected = loop.run(llm.predict(columns))
    llm.messages = "chat"
    try:
        answer = loop.run(llm.predict(columns | {"chat": text([chat, json.dumps(chat)])}))
    finally:
        llm.messages = None
    assert answer["text"].tolist() == expected["text"].tolist()
    assert answer["prompt_tokens"].tolist() == expected["prompt_tokens"].tolist()


def test_what_a_request_costs_is_counted_where_the_engine_gives_it_out(
    llm: LLM, loop: asyncio.Runner
):
    async def costs() -> tuple[Usage, Usage, Columns]:
        whole, streamed = Usage(), Usage()
        USAGE.set(whole)
        answer = await llm.predict(rows(["hello", "how late is my flight"]))
        USAGE.set(streamed)
        async for _ in llm.stream(rows(["how late is my flight"])):
            pass
        return whole, streamed, answer

    whole, streamed, answer = loop.run(costs())
    assert whole.prompt_tokens == answer["prompt_tokens"].sum()
    assert whole.completion_tokens == answer["completion_tokens"].sum()
    assert streamed.prompt_tokens == answer["prompt_tokens"][1]
    assert streamed.completion_tokens == answer["completion_tokens"][1]


def test_a_short_prompt_needs_no_thread_and_no_turn_of_the_event_loop(
    llm: LLM, loop: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
):
    renderer = llm.engine.renderer
    prompt = {"prompt": "how late is my flight"}
    turns = 0

    async def rendered() -> tuple[Any, int]:
        """What becomes of it, and the turns of the event loop that this took."""
        nonlocal turns

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        counting = asyncio.create_task(count())
        await asyncio.sleep(0)
        before = turns
        [found] = await renderer.render_cmpl_async([dict(prompt)])
        taken = turns - before
        counting.cancel()
        return found, taken

    short, turns_of_short = loop.run(rendered())
    monkeypatch.setattr(llm_frontend, "SHORT", 3)
    long, turns_of_long = loop.run(rendered())
    assert (turns_of_short, turns_of_long > 0) == (0, True)
    [whole] = renderer.render_cmpl([dict(prompt)])
    ids = [each["prompt_token_ids"] for each in (short, long, whole)]
    assert ids[0] == ids[1] == ids[2]


def test_a_cancelled_call_aborts_its_sequences(llm: LLM, loop: asyncio.Runner):
    async def cancel() -> None:
        call = asyncio.ensure_future(llm.predict(rows(models.prompts(64), budget=200)))
        await until(lambda: llm.sequences() == 64)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        # Of themselves they would take several.
        await until(lambda: not llm.sequences(), timeout_s=1)

    loop.run(cancel())


def test_what_vllm_would_do_for_every_request_or_token_is_left_out(llm: LLM, loop: asyncio.Runner):
    """Its variables are read once, its endpoints begin in their caller's task, nothing counts
    requests beside the platform, first tokens come first, and where a step that reads prompts is as
    any other nothing stands before the engine."""
    from prometheus_fastapi_instrumentator.middleware import PrometheusInstrumentatorMiddleware
    from vllm import envs
    from vllm.entrypoints.serve.utils import api_utils

    app = loop.run(llm.openai_app())
    assert envs._is_envs_cache_enabled()
    assert isinstance(api_utils.asyncio, llm_frontend._Eager)
    assert app.user_middleware
    assert PrometheusInstrumentatorMiddleware not in {each.cls for each in app.user_middleware}
    core = llm.engine.engine_core
    assert core.get_output_async.__qualname__.startswith("first_tokens_first.")
    assert core.add_request_async.__self__ is core


def test_requests_that_are_held_answer_alike_and_can_be_left(
    llm: LLM, loop: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
):
    """As on a GPU, where steps that read prompts are long: here they are said to be."""
    from vllm.config import CUDAGraphMode

    core, compiled = llm.engine.engine_core, llm.engine.vllm_config.compilation_config
    for name in ("add_request_async", "abort_requests_async", "get_output_async"):
        monkeypatch.setattr(core, name, getattr(core, name))
    monkeypatch.setattr(compiled, "cudagraph_mode", CUDAGraphMode.FULL_AND_PIECEWISE)
    admission = admit_in_groups(llm.engine)
    assert admission is not None
    llm_frontend.first_tokens_first(llm.engine, admission.saw)
    prompts = models.prompts(60, seed=4)

    async def ask() -> tuple[list[str], int, int]:
        running = asyncio.create_task(llm.predict(rows(models.prompts(12), budget=200)))
        await until(lambda: admission.steps.running > 8)
        most = dropped = 0

        async def one(prompt: str) -> str:
            answer = await llm.predict(rows([prompt]))
            return str(answer["text"][0])

        tasks = []
        for number, prompt in enumerate(prompts):
            admission.steps.fixed_s = 0.02
            tasks.append(asyncio.create_task(one(prompt)))
            await asyncio.sleep(0.002)
            most = max(most, admission.held)
            if number % 5 == 4:
                before = admission.held
                tasks.pop().cancel()
                await asyncio.sleep(0)
                dropped += before - admission.held
        texts = await asyncio.gather(*tasks)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        return texts, most, dropped

    texts, most, dropped = loop.run(ask())
    assert most > 1, "some waited for each other"
    assert dropped, "some were left while they waited"
    kept = [prompt for number, prompt in enumerate(prompts) if number % 5 != 4]
    assert texts == loop.run(llm.predict(rows(kept)))["text"].tolist()
    loop.run(until(lambda: llm.sequences() == 0))
    assert admission.held == 0


def test_the_cpu_engine_says_that_it_cannot_sleep(llm: LLM, loop: asyncio.Runner):
    with pytest.raises(ConfigError, match="no sleep mode on a CPU"):
        loop.run(llm.sleep())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": {"max_model_length": 5}}, "'max_model_length' .* mean 'max_model_len'"),
        ({"engine": {"max_model_len": "many"}}, "max_model_len"),
        ({"engine": {"structured_outputs_config": {"backends": "x"}}}, "backends"),
        ({"sampling": {"temprature": 1}}, "'temprature' .* mean 'temperature'"),
        ({"sampling": {"temperature": -1}}, "temperature"),
    ],
)
def test_options_that_vllm_does_not_take_are_named(llama: Path, options: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        LLM(str(llama), **options).setup()


def test_options_of_the_node_are_checked_where_it_is_written(llama: Path):
    with pytest.raises(ConfigError, match="needs loras"):
        LLM(str(llama), lora="adapter")
    with pytest.raises(ConfigError, match="one text for a row"):
        LLM(str(llama), sampling={"n": 2})


def test_sampling_parameters_read_structured_outputs():
    params = sampling_params({"structured_outputs": {"choice": ["a"]}, "max_tokens": 3})
    assert params.structured_outputs.choice == ["a"]


def test_the_plan_counts_the_memory_that_vllm_gives_the_cache(llm: LLM, llama: Path):
    """The same numbers as this engine's: bytes of a token, blocks, tokens, weights."""
    config = llm.engine.vllm_config
    cache, whole = config.cache_config, 1 << 30
    plan = plan_node(llm, 64 * GIB)
    assert plan is not None
    # What these tests give it on a GPU, else what the plan leaves of the memory.
    assert cache.gpu_memory_utilization == ENGINE.get("gpu_memory_utilization", 1 - plan.headroom)
    assert plan.kv_bytes == cache.kv_cache_memory_bytes == whole
    assert plan.kv_bytes_per_token * cache.kv_cache_size_tokens == whole
    assert cache.num_gpu_blocks == whole // (cache.block_size * plan.kv_bytes_per_token)
    assert plan.tokens_per_sequence == config.model_config.max_model_len
    at_once = plan.kv_bytes / (plan.kv_bytes_per_token * plan.tokens_per_sequence)
    assert at_once == cache.kv_cache_max_concurrency
    weights = load_file(llama / "model.safetensors")
    assert plan.weights_bytes == 4 * sum(tensor.numel() for tensor in weights.values())
    # What is left, once all else is taken, is what the rest of a smaller card would hold.
    small = plan_node(llm, plan.needed_bytes)
    assert small is not None
    with pytest.raises(MemoryPlanError, match=r"KV cache 1\.00 GiB for 1 × 256 tokens make 1\.0"):
        small.check()
    fits = plan_node(llm, math.ceil(plan.needed_bytes / (1 - small.headroom)))
    assert fits is not None
    assert fits.check().spare_tokens == pytest.approx(cache.kv_cache_size_tokens, abs=16)


# --- the OpenAI API of the same engine, over real sockets ----------------------------------


def whole_app(executor: StreamingExecutor, gateway: GatewayArgs | None) -> GraphApp:
    batcher = Batcher(executor.run, Batch(), max_inflight=64)
    routes = stream_routes(executor.plan, executor, 100_000)
    return graph_app(
        executor.plan, batcher, max_body_bytes=100_000, gateway=gateway, more_routes=routes
    )


@contextlib.asynccontextmanager
async def served(
    executor: StreamingExecutor, gateway: GatewayArgs | None = None
) -> AsyncIterator[str]:
    """The URL of the graph's app on the HTTP server that replicas run it on."""
    llm = executor.nodes[executor.steps[0].name]
    app = whole_app(executor, gateway)
    assert engine_step(executor.plan) is executor.steps[0]
    app.openai = OpenAIDoor(await llm.openai_app(), app.frontend, llm.check_health)
    config = uvicorn.Config(app, port=0, log_level="warning", http=LeanProtocol)
    server = uvicorn.Server(config)
    running = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await running


def asked(**more: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "how late is my flight", "temperature": 0} | more


def test_the_graphs_own_endpoint_and_the_openai_api_say_the_same(
    executor: StreamingExecutor, loop: asyncio.Runner
):
    async def both() -> tuple[Any, Any, Any]:
        async with served(executor) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
            row = {"prompt": "how late is my flight", "budget": 8}
            own = await client.post("/chat/predict", json={"rows": [row]})
            theirs = await client.post("/v1/completions", json=asked(max_tokens=8))
            adapted = await client.post("/v1/completions", json=asked(model="strange"))
            return own.json(), theirs.json(), adapted.json()

    own, theirs, adapted = loop.run(both())
    assert own["rows"][0]["text"] == theirs["choices"][0]["text"]
    assert own["rows"][0]["completion_tokens"] == theirs["usage"]["completion_tokens"]
    assert adapted["choices"][0]["text"] != theirs["choices"][0]["text"]


def test_a_hundred_clients_that_hang_up_leave_nothing_behind(
    executor: StreamingExecutor, llm: LLM, loop: asyncio.Runner
):
    async def hang_up(url: str) -> None:
        body = asked(max_tokens=240, stream=True, ignore_eos=True)
        async with (
            httpx.AsyncClient(timeout=120) as client,
            client.stream("POST", f"{url}/v1/completions", json=body) as answer,
        ):
            assert answer.status_code == 200
            await anext(answer.aiter_lines())

    async def crowd() -> tuple[int, float, int]:
        async with served(executor) as url:
            async with httpx.AsyncClient(base_url=url, timeout=60) as client:
                await client.post("/v1/completions", json=asked())
            before = len(asyncio.all_tasks())
            await asyncio.gather(*(hang_up(url) for _ in range(100)))
            # Of themselves they would take several seconds.
            await until(lambda: not llm.sequences(), timeout_s=1)
            await until(lambda: len(asyncio.all_tasks()) <= before)
            # The engine reports its cache when it steps.
            async with httpx.AsyncClient(base_url=url, timeout=60) as client:
                await client.post("/v1/completions", json=asked(max_tokens=1))
            await until(lambda: engine_metric("kv_cache_usage_perc") == 0.0)
            used = engine_metric("kv_cache_usage_perc")
            return llm.sequences(), used, len(asyncio.all_tasks()) - before

    sequences, used, tasks = loop.run(crowd())
    assert sequences == 0
    assert used == 0.0
    assert tasks <= 0


def engine_metric(name: str) -> float:
    """A metric of vLLM's own, such as the part of the KV cache that is in use."""
    labels = {"model_name": "tiny", "engine": "0"}
    found = REGISTRY.get_sample_value(f"vllm:{name}", labels)
    assert found is not None
    return found


def test_the_gateway_guards_the_openai_api_and_counts_tokens(
    executor: StreamingExecutor, loop: asyncio.Runner, tmp_path: Path
):
    key, record = new_key("ann", ("chat",))
    write_keys(tmp_path / "keys", [record])
    gateway = GatewayArgs(api_keys=tmp_path / "keys", limits=LimitArgs(tokens="40/day"))

    async def calls() -> list[httpx.Response]:
        async with (
            served(executor, gateway) as url,
            httpx.AsyncClient(base_url=url, timeout=60) as client,
        ):
            known = {"Authorization": f"Bearer {key}"}
            stranger = await client.post("/v1/completions", json=asked())
            listed = await client.get("/v1/models", headers=known)
            hidden = await client.get("/metrics", headers=known)
            large = asked(prompt="x" * 200_000)
            too_large = await client.post("/v1/completions", json=large, headers=known)
            streamed = asked(max_tokens=20, stream=True, ignore_eos=True)
            first = await client.post("/v1/completions", json=streamed, headers=known)
            more = asked(max_tokens=20, ignore_eos=True)
            second = await client.post("/v1/completions", json=more, headers=known)
            third = await client.post("/v1/completions", json=more, headers=known)
            return [stranger, listed, first, second, third, too_large, hidden]

    answers = loop.run(calls())
    assert [answer.status_code for answer in answers] == [401, 200, 200, 200, 429, 413, 404]
    stranger, listed, _, _, third, too_large, _ = answers
    assert stranger.headers["www-authenticate"] == "Bearer"
    assert stranger.json()["error"]["code"] == "unauthenticated"
    assert {model["id"] for model in listed.json()["data"]} == {"tiny", "strange"}
    assert third.json()["error"]["code"] == "rate_limited"
    assert int(third.headers["retry-after"]) >= 1
    assert too_large.json()["error"]["code"] == "body_too_large"
    assert all(answer.headers["x-request-id"] for answer in answers)


ROW: dict[str, Any] = {"prompt": "how late is my flight", "budget": 20}
#: The graph's own endpoints, and a body of one row for each.
OWN_ENDPOINTS: dict[str, Any] = {
    "/chat/predict": {"rows": [ROW]},
    "/v2/models/chat/infer": {
        "inputs": [
            {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": [ROW["prompt"]]},
            {"name": "budget", "datatype": "INT64", "shape": [1], "data": [ROW["budget"]]},
        ]
    },
    "/v2/models/chat/generate_stream": ROW,
}


async def cost_of_row(executor: StreamingExecutor) -> int:
    """The tokens that the OpenAI API counts for ROW."""
    async with served(executor) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        same = await client.post("/v1/completions", json=asked(max_tokens=ROW["budget"]))
    return int(same.json()["usage"]["total_tokens"])


@pytest.mark.parametrize("path", OWN_ENDPOINTS)
def test_rows_of_the_graphs_own_endpoints_cost_the_tokens_that_the_openai_api_counts(
    executor: StreamingExecutor, loop: asyncio.Runner, path: str
):
    async def spend(tokens: int) -> list[int]:
        """Two requests, where so many tokens are allowed."""
        gateway = GatewayArgs(limits=LimitArgs(tokens=f"{tokens}/day"))
        async with (
            served(executor, gateway) as url,
            httpx.AsyncClient(base_url=url, timeout=60) as client,
        ):
            return [
                (await client.post(path, json=OWN_ENDPOINTS[path])).status_code for _ in range(2)
            ]

    cost = loop.run(cost_of_row(executor))
    assert loop.run(spend(cost)) == [200, 429]
    assert loop.run(spend(cost + 1)) == [200, 200]


def test_rows_that_come_over_grpc_cost_the_same(executor: StreamingExecutor, loop: asyncio.Runner):
    message = pb.ModelInferRequest(model_name="chat")
    prompt = message.inputs.add(name="prompt", datatype="BYTES", shape=[1])
    prompt.contents.bytes_contents.append(ROW["prompt"].encode())
    budget = message.inputs.add(name="budget", datatype="INT64", shape=[1])
    budget.contents.int64_contents.append(ROW["budget"])

    async def spend(tokens: int) -> None:
        """Two calls, where so many tokens are allowed."""
        gateway = GatewayArgs(limits=LimitArgs(tokens=f"{tokens}/day"))
        service = OipService(whole_app(executor, gateway).frontend)
        for _ in range(2):
            await service.infer(message, service.ask("ModelInfer", (), "", None, 0))

    cost = loop.run(cost_of_row(executor))
    with pytest.raises(TwinpathError) as refused:
        loop.run(spend(cost))
    assert status_of(refused.value) == grpc.StatusCode.RESOURCE_EXHAUSTED
    loop.run(spend(cost + 1))


def test_a_stream_that_is_left_costs_what_was_written(
    executor: StreamingExecutor, llm: LLM, loop: asyncio.Runner
):
    gateway = GatewayArgs(limits=LimitArgs(tokens="10/day"))

    async def leave() -> None:
        async with (
            served(executor, gateway) as url,
            httpx.AsyncClient(base_url=url, timeout=60) as client,
        ):
            row = ROW | {"budget": 200}
            path = "/v2/models/chat/generate_stream"
            async with client.stream("POST", path, json=row) as answer:
                events = 0
                async for line in answer.aiter_lines():
                    events += line.startswith("data: ")
                    if events == 10:
                        break
            async with asyncio.timeout(30):
                # A request that costs nothing itself.
                while (await client.get("/v1/models")).status_code != 429:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            await until(lambda: not llm.sequences())

    loop.run(leave())


def test_callers_whose_rows_run_together_pay_for_their_own(
    executor: StreamingExecutor, llm: LLM, loop: asyncio.Runner, tmp_path: Path
):
    """And for those that they no longer wait for."""
    names = ("ann", "bob", "eve")
    keys = {name: new_key(name, ("chat",)) for name in names}
    write_keys(tmp_path / "keys", [record for _, record in keys.values()])
    gateway = GatewayArgs(api_keys=tmp_path / "keys", limits=LimitArgs(tokens="60/day"))
    headers = {n: {b"authorization": b"Bearer " + key.encode()} for n, (key, _) in keys.items()}

    async def calls() -> dict[str, int]:
        frontend = whole_app(executor, gateway).frontend
        path = "/chat/predict"
        codec = frontend.codec(path)
        assert codec is not None
        answers: dict[str, Answer] = {}
        asks: list[Ask] = []

        def begin(name: str, budget: int) -> Exchange:
            ask = frontend.ask(path, headers[name], 0, "")
            asks.append(ask)
            body = json.dumps({"rows": [ROW | {"budget": budget}] * 2}).encode()
            request = Request(path, b"", headers[name], body)
            return frontend.begin(codec, request, ask, lambda a: answers.update({name: a}))

        begin("ann", 1)
        begin("bob", 100)
        gone = begin("eve", 100)
        await until(lambda: llm.sequences() >= 4)
        gone.give_up()
        await until(lambda: not llm.sequences() and len(answers) == 3)
        assert answers["bob"].status == 200
        assert asks[0].timing is not None
        assert asks[0].timing.batch_rows == 6
        for name in names:
            begin(name, 1)
        await until(lambda: not frontend.waiting and not llm.sequences())
        return {name: answers[name].status for name in names}

    assert loop.run(calls()) == {"ann": 200, "bob": 429, "eve": 429}


@pytest.mark.parametrize("stream", [True, False])
def test_a_deadline_ends_an_answer_and_its_sequences(
    executor: StreamingExecutor, llm: LLM, loop: asyncio.Runner, stream: bool
):
    choices, length = 400, 200

    async def late() -> tuple[httpx.Response, float]:
        async with (
            served(executor, GatewayArgs()) as url,
            httpx.AsyncClient(base_url=url, timeout=60) as client,
        ):
            body = asked(max_tokens=length, n=choices, temperature=1, ignore_eos=True)
            headers = {"X-Request-Timeout-Ms": "300"}
            before = engine_metric("generation_tokens_total")
            answer = await client.post(
                "/v1/completions", json=body | {"stream": stream}, headers=headers
            )
            await until(lambda: not llm.sequences())
            # The engine reports its cache when it steps.
            await client.post("/v1/completions", json=asked(max_tokens=1))
            await until(lambda: engine_metric("kv_cache_usage_perc") == 0.0)
            return answer, engine_metric("generation_tokens_total") - before

    answer, written = loop.run(late())
    assert answer.status_code == (200 if stream else 504)
    assert "deadline_exceeded" in answer.text
    assert written < choices * length / 2, "it was not ended"


@pytest.mark.skipif(ON_GPU, reason="one card is not two")
def test_an_engine_on_two_workers_writes_what_it_does_on_one(
    llm: LLM, loop: asyncio.Runner, llama: Path
):
    """Tensor parallelism: each has half of the weights."""
    asked = rows(models.prompts(20), budget=16)
    alone = loop.run(llm.predict(asked))["text"].tolist()
    node = LLM(
        str(llama), sampling={"temperature": 0.0}, by_row={"max_tokens": "budget"},
        engine={**ENGINE, "tensor_parallel_size": 2}, environment=ENVIRONMENT,
    )  # fmt: skip
    node.setup()
    try:
        processes = node.engine_processes()
        answer = asyncio.run(node.predict(asked))
    finally:
        node.teardown()
    _gone(processes)
    assert len(processes) >= 3, "one worker is in the core's process, two have their own"
    assert answer["text"].tolist() == alone


@pytest.mark.flaky(reruns=0)
def test_a_dead_engine_is_no_fault_of_the_rows(llm: LLM, loop: asyncio.Runner):
    """Last of those with this engine: it is gone afterwards."""

    async def killed() -> None:
        call = asyncio.ensure_future(llm.predict(rows(models.prompts(64), budget=200)))
        await until(lambda: llm.sequences() == 64)
        for pid in processes:
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(RetryLaterError, match="being replaced: try again"):
            await asyncio.wait_for(call, 60)

    processes = llm.engine_processes()
    loop.run(killed())
    with pytest.raises(RetryLaterError, match="has ended"):
        llm.check_health()
    llm.teardown()
    _gone(processes)


# --- embeddings -----------------------------------------------------------------------------


def test_embeddings_are_those_of_the_model(minilm: Path):
    import torch
    from transformers import AutoModel, AutoTokenizer

    texts = ["my flight is late", "when does the plane arrive", "refund my ticket"]
    tokenizer, model = AutoTokenizer.from_pretrained(minilm), AutoModel.from_pretrained(minilm)
    read = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**read).last_hidden_state
    mask = read["attention_mask"][..., None]
    expected = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1).numpy()

    engine = {"enforce_eager": True, "dtype": "float32", "max_model_len": 128}
    node = Embed(str(minilm), engine=engine, environment=ENVIRONMENT)
    node.setup()

    async def calls() -> tuple[Columns, Any, Any]:
        columns = await node.predict({"text": text([*texts, ""])})
        transport = httpx.ASGITransport(await node.openai_app())
        async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
            body = {"model": str(minilm), "input": texts}
            vectors = await client.post("/v1/embeddings", json=body)
            body = {"model": str(minilm), "text_1": texts[0], "text_2": texts[1:]}
            return columns, vectors.json(), (await client.post("/score", json=body)).json()

    try:
        found, vectors, scores = asyncio.run(calls())
    finally:
        node.teardown()
    for position, row in enumerate(vectors["data"]):
        np.testing.assert_allclose(row["embedding"], found["embedding"][position], atol=1e-5)
    likeness = [float(expected[0] @ other) for other in expected[1:]]
    assert [row["score"] for row in scores["data"]] == pytest.approx(likeness, abs=2e-3)
    assert found["embedding"].dtype == np.float32
    np.testing.assert_allclose(found["embedding"][:3], expected, atol=2e-3)
    assert "expected text" in found[ROW_ERROR][3].message


def test_classes_are_those_of_the_model(minilm: Path, tmp_path: Path):
    """An encoder with a head of three classes: by transformers, by the node, and by vLLM's own
    endpoint."""
    import torch
    from transformers import AutoTokenizer

    models.make_classifier(minilm, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = models.classifier(tmp_path)
    texts = [
        "my flight is late", "when does the plane arrive", "refund my ticket", "why", "a dog",
        "seat by the window please, it is for my grandmother who cannot walk so well",
    ]  # fmt: skip
    with torch.no_grad():
        logits = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    expected = logits.softmax(1).numpy()
    assert np.ptp(expected, axis=0).max() > 0.1, "the texts are told apart"

    engine = {"enforce_eager": True, "dtype": "float32", "max_model_len": 128}
    node = Classify(str(tmp_path), engine=engine, environment=ENVIRONMENT)
    node.setup()

    async def calls() -> tuple[Columns, Any]:
        columns = await node.predict({"text": text([*texts, ""])})
        transport = httpx.ASGITransport(await node.openai_app())
        async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
            body = {"model": str(tmp_path), "input": texts}
            return columns, (await client.post("/classify", json=body)).json()

    try:
        found, classes = asyncio.run(calls())
    finally:
        node.teardown()
    assert found["probabilities"].dtype == np.float32
    assert found["probabilities"].shape == (7, 3)
    np.testing.assert_allclose(found["probabilities"][:6], expected, atol=2e-3)
    theirs = [row["probs"] for row in classes["data"]]
    np.testing.assert_allclose(found["probabilities"][:6], theirs, atol=1e-5)
    assert [row["label"] for row in classes["data"]] == [
        model.config.id2label[best] for best in expected.argmax(1)
    ]
    assert "expected text" in found[ROW_ERROR][6].message


# --- how a parent may end -------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[2]
PARENT = """
import json, sys, time
from twinpath.nodes.llm import LLM

if __name__ == "__main__":
    model, engine, environment = json.loads(sys.argv[1])
    node = LLM(model, engine=engine, environment=environment)
    node.setup()
    print(json.dumps(node.engine_processes()), flush=True)
    time.sleep(600)
"""


def test_no_process_of_an_engine_outlives_a_parent_that_is_killed(llama: Path, tmp_path: Path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    given = json.dumps([str(llama), ENGINE, ENVIRONMENT])
    parent = subprocess.Popen(
        [sys.executable, str(script), given],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT / "platform")},
    )
    try:
        assert parent.stdout is not None
        line = next((line for line in parent.stdout if line.startswith(b"[")), b"[]")
        processes = json.loads(line)
        assert len(processes) >= 2, "an engine has a core and a worker"
        assert all(Path(f"/proc/{pid}").exists() for pid in processes)
    finally:
        parent.kill()
        parent.wait()
    _gone(processes)


def _gone(processes: list[int]) -> None:
    """One that was killed still has to give back its memory before it is gone."""
    deadline_s = time.monotonic() + 60
    while (left := [p for p in processes if _lives(p)]) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert left == []


def _lives(pid: int) -> bool:
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
