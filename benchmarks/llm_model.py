"""The tiny model of the benchmarks of language models, and its graph."""

import os
import random
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from twinpath import Graph
from twinpath.nodes.llm import LLM

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


def make_model(folder: Path) -> None:
    """A Llama of two layers with random weights and a trained tokenizer, unless it is there."""
    if (folder / "config.json").exists():
        return
    from tests.llm.models import make_llama

    make_llama(folder)


def app(args: dict[str, Any]) -> Any:
    """Serve's builder of the graph that is the engine."""
    from benchmarks.llm_serving import ENGINE

    graph = Graph("llm", input=Prompt, output=Text)
    with graph as rows:
        graph.output(LLM(os.environ["TWINPATH_BENCH_LLM"], engine=ENGINE)(rows))
    return graph.app(args)
