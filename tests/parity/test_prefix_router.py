"""Prompts to replicas by their beginnings, on a real Ray Serve with two replicas."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from pydantic import BaseModel
from ray import serve

from twinpath import Batch, Graph, Node, Replicas
from twinpath.errors import InputError

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

    async def stream(self, columns):
        if columns["prompt"][0] == "refused":
            raise InputError("no such prompt")
        for _ in range(3):
            yield {"pid": np.array([os.getpid()])}
        if columns["prompt"][0] == "breaks":
            raise InputError("it broke off")


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

    def stream(prompt: str) -> httpx.Response:
        url = f"{ray_and_serve}/here/v2/models/here/generate_stream"
        return httpx.post(url, json={"prompt": prompt}, timeout=60)

    answer = stream(TOPICS[0])
    events = [json.loads(line[6:]) for line in answer.text.split("\n\n") if line]
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert len(events) == 3
    assert {event["pid"] for event in events} <= everywhere
    broken = [json.loads(line[6:]) for line in stream("breaks").text.split("\n\n") if line]
    assert [*broken[-1]] == ["error", "code"]
    assert (len(broken), broken[-1]["code"]) == (4, "invalid_input")
    refused = stream("refused")
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_input")
    serve.delete("here")
