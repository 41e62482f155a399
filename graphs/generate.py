"""Texts for prompts, with what each cost in tokens: one engine, any model."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field

from twinpath import Batch, Graph, Replicas
from twinpath.nodes.llm import LLM


class Prompt(BaseModel):
    """What is asked."""

    prompt: str = Field(min_length=1)


class Written(BaseModel):
    """What the model wrote. ``finish_reason`` is ``stop`` or ``length``."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


def generation(
    model: str,
    *,
    sampling: Mapping[str, Any] | None = None,
    engine: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
    engines: int = 1,
    num_cpus: float | None = 1,
    num_gpus: float = 0,
    batch_size: int = 64,
) -> Graph:
    """The graph of one model; ``engines`` replicas or actors of so many CPUs and GPUs each."""
    graph = Graph("generate", input=Prompt, output=Written)
    llm = LLM(model, sampling=sampling, engine=engine, environment=environment)
    with graph as rows:
        placed = llm.on(
            num_cpus=num_cpus, num_gpus=num_gpus, replicas=Replicas(engines, engines),
            batch=Batch(max_size=batch_size),
        )  # fmt: skip
        graph.output(placed(rows))
    return graph
