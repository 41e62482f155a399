"""The support graph with a real embedding model and a real engine, in process."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from graphs.support import SURE, support
from graphs.support_model.nodes import OTHER, Answer, Intents, intents, verdict_schema
from llm.conftest import ENGINE, ENVIRONMENT
from twinpath.nodes.llm_memory import GIB, plan_node

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

#: Messages that are not among the examples, and what they are about.
KNOWN = {
    "Could you pay me back what the ticket cost?": "refund",
    "the money for my cancelled flight is still not on my account": "refund",
    "my bag never showed up at baggage claim": "baggage_lost",
    "someone broke the wheels of my suitcase during the flight": "baggage_lost",
    "how big can a cabin bag be": "baggage_allowance",
    "price for one more suitcase of 20 kg": "baggage_allowance",
    "is flight 212 to Miami late?": "delay_status",
    "what time are we leaving now that it is delayed": "delay_status",
    "the first plane was late so the connecting one left without us": "missed_connection",
    "missed my transfer in Charlotte, need another flight": "missed_connection",
    "I want to fly on Sunday rather than Saturday": "change_booking",
    "my last name is misspelled on the booking": "change_booking",
    "please cancel our booking": "cancel_booking",
    "we are not going to fly, cancel everything": "cancel_booking",
    "where is my boarding pass": "check_in",
    "at what time does check in close": "check_in",
    "can my wife and I sit next to each other": "seat",
    "I'd like extra leg room": "seat",
    "my grandmother cannot walk and needs a wheelchair": "assistance",
    "my daughter travels alone, she is ten": "assistance",
}
STRANGE = [
    "what is the capital of France", "lorem ipsum dolor", "do you sell gift cards?", "asdf",
    "the coffee was cold and the crew rude",
]  # fmt: skip


@pytest.fixture(scope="module")
def graph(llama: Path, minilm: Path) -> Iterator[Any]:
    engine = {**ENGINE, "max_model_len": 512, "enable_prefix_caching": True}
    engine["structured_outputs_config"] = {
        "backend": "xgrammar", "disable_any_whitespace": True,
    }  # fmt: skip
    made = support(
        str(minilm), str(llama), engine=engine, environment=ENVIRONMENT, fused=True,
        max_reply_chars=30,
    )  # fmt: skip
    yield made
    made.close()


def test_what_the_examples_know_is_answered_without_the_language_model(graph):
    rows = graph.run([{"message": message} for message in KNOWN]).raise_for_errors().rows()
    for (message, intent), row in zip(KNOWN.items(), rows, strict=True):
        assert row["intent"] == intent, message
        assert row["answered_by"] == "examples"
        assert row["reply"] == intents()[intent]["reply"]
        assert row["completion_tokens"] == 0
        assert row["confidence"] >= SURE


def test_what_they_do_not_know_goes_to_the_language_model_and_fits_the_schema(graph):
    mixed = [*STRANGE, *list(KNOWN)[:3]]
    rows = graph.run([{"message": message} for message in mixed]).raise_for_errors().rows()
    for row in rows[: len(STRANGE)]:
        assert row["confidence"] < SURE
        assert row["answered_by"] == "model"
        assert row["intent"] in {*intents(), OTHER}
        assert 0 < len(row["reply"]) <= 30
        assert row["completion_tokens"] > 0
    assert {row["answered_by"] for row in rows[len(STRANGE) :]} == {"examples"}


def test_the_question_is_read_from_the_prefix_cache_but_for_its_end(graph):
    node = engine_node(graph)
    before = node.load.prefix_hits
    graph.run([{"message": message} for message in STRANGE]).raise_for_errors()
    assert node.load.prefix_queries > 0
    assert node.load.prefix_hits > before


def test_a_memory_plan_says_what_the_engine_itself_counts(graph):
    node = engine_node(graph)
    cache = node.engine.vllm_config.cache_config
    plan = plan_node(node, 64 * GIB)
    assert plan is not None
    blocks = plan.kv_bytes // (plan.kv_bytes_per_token * cache.block_size)
    assert plan.kv_bytes == GIB, "VLLM_CPU_KVCACHE_SPACE=1"
    assert cache.num_gpu_blocks == blocks
    assert plan.tokens_per_sequence == node.engine.model_config.max_model_len


def engine_node(graph: Any) -> Any:
    [step] = [s for s in graph.plan.steps if s.name == "llm"]
    return graph._runner._executor.loaded(step)


def test_a_verdict_that_breaks_off_goes_to_a_person():
    answer = Answer()
    good = json.dumps({"intent": "seat", "urgent": False, "reply": "By the window."})
    assert answer._judged(good)["answered_by"] == "model"
    for bad in (good[:-3], "", "{}", '{"intent": "seat", "urgent": false, "reply": "x", "y": 1}'):
        assert answer._judged(bad)["answered_by"] == "person"


def test_examples_are_written_once_and_each_intent_has_several():
    texts = [text.lower() for entry in intents().values() for text in entry["examples"]]
    assert len(set(texts)) == len(texts) >= 8 * len(intents())
    assert not {*texts} & {message.lower() for message in KNOWN}
    assert verdict_schema()["properties"]["intent"]["enum"] == [*intents(), OTHER]
    assert Intents("nowhere").k < len(texts)
