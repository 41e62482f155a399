"""The engine that the tests serve; replicas import it from this folder."""

import os

from llm.conftest import ENVIRONMENT, SERVED, Reply, Ticket
from twinpath import Graph
from twinpath.nodes.llm import LLM

graph = Graph("chat", input=Ticket, output=Reply)
with graph as tickets:
    node = LLM(
        os.environ["TWINPATH_TEST_LLAMA"],
        engine=SERVED,
        environment=ENVIRONMENT,
        by_row={"max_tokens": "budget"},
        sampling={"temperature": 0.0},
    )
    graph.output(node(tickets))

app = graph.app
