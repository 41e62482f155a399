"""Prompts to replicas by their beginnings, on a real Ray Serve with two replicas."""

import os
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from pydantic import BaseModel
from ray import serve

from twinpath import Batch, Graph, Node, Replicas

TOPICS = [
    f"You are an assistant for {topic}. Answer in one sentence, and be kind to everybody. " * 2
    for topic in ("shoes", "banks", "trains", "plants", "films", "bread")
]


class Ask(BaseModel):
    prompt: str
    session: str = ""


class Seen(BaseModel):
    pid: int


class Here(Node):
    """Says which process a prompt came to. Routed as engines are."""

    inputs = {"prompt": "str", "session": "str"}
    outputs = {"pid": "int64"}
    routed_by = {"column": "prompt", "session": "session"}
    max_inflight = 64

    async def predict(self, columns):
        return {"pid": np.full(len(columns["prompt"]), os.getpid())}


graph = Graph("here", input=Ask, output=Seen)
with graph as row:
    placed = Here().on(num_cpus=0.1, replicas=Replicas(2, 2), batch=Batch(max_size=8))
    graph.output(placed(row))


@pytest.mark.timeout(180)
def test_prompts_that_begin_alike_come_to_one_replica_and_all_replicas_get_some(ray_and_serve):
    serve.run(graph.app({}), name="here", route_prefix="/here")

    def ask(rows: list[dict[str, str]]) -> list[int]:
        answer = httpx.post(f"{ray_and_serve}/here/predict", json={"rows": rows}, timeout=60)
        assert answer.status_code == 200, answer.text
        return [row["pid"] for row in answer.json()["rows"]]

    homes: dict[str, set[int]] = {topic: set() for topic in TOPICS}
    for number in range(8):
        for topic in TOPICS:
            session = {"prompt": f"{topic}{number}", "session": f"{topic}{number}"}
            homes[topic].update(ask([session]))
    assert all(len(pids) == 1 for pids in homes.values()), homes
    everywhere = set().union(*homes.values())
    assert len(everywhere) == 2, "what begins differently is spread"

    stays = [ask([{"prompt": topic, "session": "ann"}])[0] for topic in TOPICS]
    assert len(set(stays)) == 1, "a session stays, whatever it asks"

    mixed = [{"prompt": topic + "again", "session": topic[:30]} for topic in TOPICS] * 3
    assert [{pid} for pid in ask(mixed)] == [homes[row["prompt"][:-5]] for row in mixed], (
        "rows of one batch go their own ways, and come back in order"
    )
    with ThreadPoolExecutor(16) as pool:
        crowd = list(pool.map(ask, [[{"prompt": TOPICS[0], "session": ""}] * 20] * 16))
    assert all(len(pids) == 20 for pids in crowd)
    serve.delete("here")
