"""A language model as a graph: chats in, texts out, and the OpenAI API beside it.

What model it is, and how its engine runs, is said by the environment, so that one file serves the
CPU and the GPU: ``TWINPATH_CHAT_MODEL`` is a folder or name, ``TWINPATH_CHAT_ENGINE`` a JSON object
of vLLM's engine arguments, ``TWINPATH_CHAT_OPENAI`` one of options of its OpenAI server.
"""

import json
import os

from pydantic import BaseModel, Field

from twinpath import Graph
from twinpath.nodes.llm import LLM


class Question(BaseModel):
    """One chat."""

    messages: str = Field(
        description='JSON: a list of {"role", "content"}',
        examples=['[{"role": "user", "content": "Why is my flight late?"}]'],
    )
    max_tokens: int = Field(256, ge=1)


class Reply(BaseModel):
    """What the model writes to it."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


graph = Graph("chat", input=Question, output=Reply)
with graph as questions:
    llm = LLM(
        os.environ.get("TWINPATH_CHAT_MODEL", "models/chat"),
        messages="messages",
        by_row={"max_tokens": "max_tokens"},
        engine=json.loads(os.environ.get("TWINPATH_CHAT_ENGINE", "{}")),
        openai=json.loads(os.environ.get("TWINPATH_CHAT_OPENAI", "{}")),
    )
    graph.output(llm(questions))

app = graph.app
