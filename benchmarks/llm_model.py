"""The model of the benchmarks of language models, and its graph: tiny on CPUs, where a step of its
engine takes a millisecond or two, and of 0.7 billion weights where there is a GPU."""

import os
import random
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from twinpath import Graph
from twinpath.nodes.llm import LLM
from twinpath.nodes.llm_memory import card_bytes

#: The model where there is a GPU, and arguments of an engine that shares the card with a peer's:
#: else vLLM's own choice, compiled and with CUDA graphs.
GPU_SIZES = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 16,
    "num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 2048,
}  # fmt: skip
GPU_ENGINE: dict[str, Any] = {"gpu_memory_utilization": 0.3, "enforce_eager": False}

_TEXT = "the flight from Newark is late on time weather carrier gate why my bag please when"
_WORDS = _TEXT.split()


class Prompt(BaseModel):
    """What is asked."""

    prompt: str


class Text(BaseModel):
    """What is written."""

    text: str


def prompts(count: int) -> list[str]:
    """So many different prompts."""
    source = random.Random(3)
    return [f"{number} " + " ".join(source.choices(_WORDS, k=12)) for number in range(count)]


def on_gpu() -> bool:
    """Whether engines run on a GPU here."""
    return card_bytes() is not None


def published_as(name: str) -> str:
    """What the benchmark's results are called: those of a GPU stand beside those of CPUs."""
    return f"{name}_gpu" if on_gpu() else name


def sizes() -> dict[str, int]:
    """The model's, for what there is to run on."""
    return GPU_SIZES if on_gpu() else {}


def engine(options: dict[str, Any]) -> dict[str, Any]:
    """The engine's arguments for what there is to run on."""
    return options | (GPU_ENGINE if on_gpu() else {})


def make_model(folder: Path) -> Path:
    """A Llama with random weights and a trained tokenizer in the folder's ``llm``, or ``llm_gpu``,
    unless it is there; where it is."""
    place = folder / published_as("llm")
    if not (place / "config.json").exists():
        from tests.llm.models import make_llama

        make_llama(place, **sizes())
    return place


def app(args: dict[str, Any]) -> Any:
    """Serve's builder of the graph that is the engine."""
    from benchmarks.llm_serving import ENGINE

    graph = Graph("llm", input=Prompt, output=Text)
    with graph as rows:
        graph.output(LLM(os.environ["TWINPATH_BENCH_LLM"], engine=engine(ENGINE))(rows))
    return graph.app(args)
