"""An engine on a GPU: the plan against what it takes, sleep, and what it leaves behind."""

import asyncio
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from llm import models
from llm.conftest import ON_GPU
from llm.test_engine import text
from twinpath.cli.main import app
from twinpath.nodes.llm import LLM
from twinpath.nodes.llm_memory import card_bytes, plan_node

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not ON_GPU, reason="needs a GPU"),
]
#: Of weights in bfloat16: some 0.4 GiB.
SIZES = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 2048,
}  # fmt: skip
SHARE = 0.4


def used_bytes() -> int:
    """What all processes hold of the card, by NVML."""
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    return int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose weights can be seen on the card."""
    return models.make_llama(tmp_path_factory.mktemp("model"), **SIZES)


@pytest.fixture(scope="module")
def before_bytes() -> int:
    """What the card held before the engine."""
    return used_bytes()


@pytest.fixture(scope="module")
def llm(model: Path, before_bytes: int) -> Iterator[LLM]:
    """An engine that can sleep."""
    node = LLM(
        str(model), sampling={"temperature": 0, "max_tokens": 24},
        engine={
            "enable_sleep_mode": True, "gpu_memory_utilization": SHARE, "max_model_len": 1024,
            "max_num_seqs": 32, "dtype": "bfloat16", "enforce_eager": True,
        },
    )  # fmt: skip
    node.setup()
    yield node
    node.teardown()


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    """One loop for all: an engine stays with it."""
    with asyncio.Runner() as runner:
        yield runner


def test_the_plan_is_what_the_engine_takes(llm: LLM, model: Path, before_bytes: int):
    plan, card = plan_node(llm, num_gpus=1), card_bytes()
    assert plan is not None
    assert plan.total_bytes == card
    weights = load_file(model / "model.safetensors")
    assert plan.weights_bytes == sum(t.numel() * t.element_size() for t in weights.values())
    cache = llm.engine.vllm_config.cache_config
    tokens = cache.num_gpu_blocks * cache.block_size
    # The share of the card, less weights and working memory, is the cache; the context of CUDA and
    # what the kernels were compiled to are within the headroom.
    taken = plan.weights_bytes + tokens * plan.kv_bytes_per_token
    assert 0.85 * SHARE * plan.total_bytes < taken <= SHARE * plan.total_bytes
    found = used_bytes() - before_bytes
    assert taken < found < taken + plan.headroom * plan.total_bytes


def test_the_command_reads_the_card_and_refuses_with_the_numbers(model: Path):
    fits = CliRunner().invoke(app, ["plan-memory", str(model)])
    assert fits.exit_code == 0, fits.output
    card = card_bytes()
    assert card is not None
    assert f"{card / 2**30:.3f}" in fits.output
    refused = CliRunner().invoke(app, ["plan-memory", str(model), "--sequences", "100000"])
    assert refused.exit_code == 1
    assert "100,000" in refused.output or "100000" in refused.output


def test_sleep_frees_the_card_and_waking_answers_as_before(llm: LLM, loop: asyncio.Runner):
    # One at a time: in bfloat16 a token of random weights depends on what else is in its step.
    prompts: list[dict[str, Any]] = [{"prompt": text([each])} for each in models.prompts(8)]
    first = [loop.run(llm.predict(each))["text"].tolist() for each in prompts]
    awake = used_bytes()
    loop.run(llm.sleep())
    asleep = used_bytes()
    cache = llm.engine.vllm_config.cache_config
    plan = plan_node(llm, num_gpus=1)
    assert plan is not None
    held = cache.num_gpu_blocks * cache.block_size * plan.kv_bytes_per_token + plan.weights_bytes
    assert awake - asleep > 0.9 * held
    loop.run(llm.wake_up())
    assert math.isclose(used_bytes(), awake, rel_tol=0.05)
    assert [loop.run(llm.predict(each))["text"].tolist() for each in prompts] == first


def test_nothing_stays_on_the_card(model: Path, llm: LLM, before_bytes: int):
    """The last one: ends the engine."""
    assert llm.engine_processes()
    llm.teardown()
    assert not llm.engine_processes()
    # This process itself has no context on the card.
    assert used_bytes() < before_bytes + (1 << 28)
