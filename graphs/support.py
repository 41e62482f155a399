"""Answers to messages of passengers: examples where they suffice, a language model where not.

Prepare with `python -m graphs.support_model.prepare --llm FOLDER`; then
`serve run graphs.support:app`. Any model that vLLM serves will do.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field

from graphs.support_model.nodes import Answer, Intents, Question, Sentences, verdict_schema
from graphs.support_model.prepare import support_dir
from twinpath import Batch, Graph, Replicas, col
from twinpath.nodes.llm import LLM

#: Below this confidence the examples do not decide.
SURE = 0.4


class Message(BaseModel):
    """What a passenger wrote."""

    message: str = Field(min_length=1, max_length=1000)


class Reply(BaseModel):
    """``answered_by`` is ``examples``, ``model`` or ``person``; ``confidence`` the examples'."""

    intent: str
    confidence: float
    reply: str
    urgent: bool
    answered_by: str
    completion_tokens: int


def support(
    embeddings: str,
    llm: str,
    *,
    engine: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
    sure: float = SURE,
    num_gpus: float = 0,
    replicas: Replicas | None = None,
    fused: bool = False,
    max_reply_chars: int = 400,
) -> Graph:
    """The graph of two models' folders. The engine has replicas of its own unless ``fused``."""
    graph = Graph("support", input=Message, output=Reply)
    writer = LLM(
        llm, messages="chat", output="verdict", engine=engine, environment=environment,
        sampling={
            # Enough for any verdict: a character is at most six tokens, as `\u00e9`.
            "temperature": 0.0, "max_tokens": 80 + 6 * max_reply_chars,
            "structured_outputs": {"json": verdict_schema(max_reply_chars)},
        },
    )  # fmt: skip
    if not fused:
        writer = writer.on(
            num_gpus=num_gpus, replicas=replicas or Replicas(1, 2, target_queue=16),
            batch=Batch(max_size=32),
        )  # fmt: skip
    with graph as message:
        vector = Sentences(embeddings)(message)
        intent = Intents(embeddings)(vector)
        unsure = col("confidence") < sure
        question = Question()(intent, where=unsure, default={"chat": ""})
        verdict = writer(
            question, where=unsure, default={"prompt_tokens": 0, "completion_tokens": 0}
        )
        graph.output(Answer()(intent, verdict))
    return graph


graph = support(str(support_dir() / "embeddings"), str(support_dir() / "llm"))
app = graph.app
