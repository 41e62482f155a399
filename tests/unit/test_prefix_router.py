"""The prefix policy behind Serve's router interface, without a cluster."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("ray.serve")

from ray.serve._private.request_router.common import PendingRequest

from twinpath import Batch, Graph, Node, Replicas
from twinpath.online.builder import PREFIX_ROUTER, _routing
from twinpath.online.prefix_router import PrefixRouter

PROMPT = "You answer for a shop that sells shoes. Be short and be kind. " * 3
REPLICAS = [SimpleNamespace(replica_id=name) for name in ("a", "b")]


def router(**settings):
    made = object.__new__(PrefixRouter)
    made.initialize_state(**settings)
    return made


def pending(request: str, **columns: str | None) -> PendingRequest:
    rows = {name: np.array([value], dtype=object) for name, value in columns.items()}
    return PendingRequest([rows], {}, SimpleNamespace(internal_request_id=request))


async def chosen(made, request) -> list[list[str]]:
    ranks = await made.choose_replicas(REPLICAS, request)
    return [[replica.replica_id for replica in rank] for rank in ranks]


async def test_the_home_of_a_prompt_comes_first_and_the_others_after_it():
    made = router(column="prompt")
    first = await chosen(made, pending("1", prompt=PROMPT + "one"))
    assert sorted(rank[0] for rank in first) == ["a", "b"]
    assert await chosen(made, pending("2", prompt=PROMPT + "two")) == first


async def test_calls_that_are_no_rows_may_go_anywhere():
    made = router(column="prompt")
    assert await chosen(made, None) == [["a", "b"]]
    assert await chosen(made, pending("1", other="x")) == [["a", "b"]]
    assert await chosen(made, PendingRequest([], {}, SimpleNamespace())) == [["a", "b"]]
    assert await made.choose_replicas([], pending("1", prompt="x")) == []


@pytest.mark.parametrize("empty", [None, ""])
async def test_rows_that_name_no_session_do_not_belong_together(empty):
    made = router(column="prompt", session="who")
    in_none = [await chosen(made, pending(str(n), prompt="hi", who=empty)) for n in range(4)]
    assert {rank[0][0] for rank in in_none} == {"a", "b"}
    in_one = [await chosen(made, pending(str(n), prompt="hi", who="ann")) for n in range(4)]
    assert len({rank[0][0] for rank in in_one}) == 1


async def test_a_request_counts_until_it_is_completed_or_given_up():
    made = router(column="prompt", session="who", slack=0)
    [[home], _] = await chosen(made, pending("1", prompt=PROMPT, who="ann"))
    assert made._policy.load(home) == 1
    made.on_request_routed(pending("1", prompt=PROMPT), "b", None)
    assert made._policy.load("b") == 1
    made.on_request_completed("b", "1")
    assert made._policy.load("a") == made._policy.load("b") == 0

    waiting = pending("2", prompt=PROMPT, who="bob")
    await chosen(made, waiting)
    assert made._policy.load("a") + made._policy.load("b") == 1
    waiting.future.cancel()
    await asyncio.sleep(0)
    assert made._policy.load("a") + made._policy.load("b") == 0


class Routed(Node):
    inputs = {"prompt": "str"}
    outputs = {"text": "str"}
    routed_by = {"column": "prompt", "session": None}

    def predict(self, columns):
        return {"text": columns["prompt"]}


def step_of(node, replicas):
    from pydantic import BaseModel

    class Ask(BaseModel):
        prompt: str

    class Told(BaseModel):
        text: str

    graph = Graph("routed", input=Ask, output=Told)
    with graph as row:
        graph.output(node.on(replicas=replicas, batch=Batch(max_size=4))(row))
    return graph.plan.steps[0]


def test_several_replicas_of_an_engine_get_the_router_and_a_single_one_serve_s_own():
    config = _routing(step_of(Routed(), Replicas(1, 2)))["request_router_config"]
    assert config.request_router_class == PREFIX_ROUTER
    assert config.request_router_kwargs == {"column": "prompt", "session": None}
    assert config.get_request_router_class() is PrefixRouter
    assert _routing(step_of(Routed(), Replicas(1, 1))) == {}
