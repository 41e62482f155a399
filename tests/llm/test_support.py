"""The support graph's own parts: a real embedding model, examples, verdicts."""

import json
from pathlib import Path

import numpy as np
import pytest

from graphs.support import SURE, support
from graphs.support_model.nodes import (
    OTHER,
    Answer,
    Intents,
    Question,
    intents,
    verdict_schema,
)
from twinpath.graph.streaming import first_row

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
def intent_node(minilm: Path) -> Intents:
    node = Intents(str(minilm))
    node.setup()
    return node


def test_the_examples_know_what_passengers_ask_in_other_words(intent_node):
    found = intent_node.predict({"vector": intent_node.vectors([*KNOWN])})
    assert found["intent"].tolist() == [*KNOWN.values()]
    assert (found["confidence"] >= SURE).all()


def test_what_fits_no_intent_is_left_to_the_language_model(intent_node):
    found = intent_node.predict({"vector": intent_node.vectors(STRANGE)})
    assert (found["confidence"] < SURE).all()


def test_the_question_begins_alike_for_all_and_only_unsure_rows_go_to_the_engine():
    chats = Question().predict({"message": np.array(["one", "two"], dtype=object)})["chat"]
    first, second = (json.loads(chat) for chat in chats)
    assert first[0] == second[0]
    assert [chat[1]["content"] for chat in (first, second)] == ["one", "two"]
    steps = {step.name: step for step in support("embeddings", "llm").plan.steps}
    assert steps["llm"].where is not None
    assert steps["llm"].placement is not None
    assert support("embeddings", "llm", fused=True).plan.placed == ()


def test_a_verdict_that_breaks_off_goes_to_a_person():
    answer = Answer()
    good = json.dumps({"intent": "seat", "urgent": False, "reply": "By the window."})
    assert answer._judged(good)["answered_by"] == "model"
    tab = '{"intent": "seat", "urgent": false, "reply": "a\tb"}'
    assert answer._judged(tab)["reply"] == "a\tb", "as grammars let models write it"
    for bad in (good[:-3], "", "{}", '{"intent": "seat", "urgent": false, "reply": "x", "y": 1}'):
        assert answer._judged(bad)["answered_by"] == "person"


async def replies(*verdicts: str | None) -> list[dict[str, object]]:
    async def batches():
        for verdict in verdicts:
            yield {
                "intent": np.array(["seat"], dtype=object),
                "confidence": np.array([0.1], np.float32),
                "verdict": np.array([verdict], dtype=object),
            }

    return [first_row(part) async for part in Answer().follow(batches())]


async def test_a_reply_comes_as_it_is_written():
    verdict = json.dumps({"intent": "seat", "urgent": True, "reply": 'By the "window" \u00e9.'})
    parts = await replies(*verdict)
    assert "".join(part["reply"] for part in parts) == 'By the "window" \u00e9.'
    assert len(parts) > 10
    for part in parts:
        rest = {"intent": "seat", "urgent": True, "answered_by": "model"}
        assert part == rest | {"reply": part["reply"]}
    tab = verdict.replace("window", "win\tdow")
    parts = await replies(*tab)
    assert "".join(part["reply"] for part in parts) == 'By the "win\tdow" \u00e9.'
    assert len(parts) > 10


async def test_a_message_that_the_examples_answer_is_one_part():
    [part] = await replies(None)
    assert (part["answered_by"], part["intent"]) == ("examples", "seat")


async def test_a_verdict_that_breaks_off_while_it_is_told_ends_with_a_person():
    *begun, last = await replies('{"intent": "seat", "urgent": false, ', '"reply": "By the', " win")
    assert [part["reply"] for part in begun] == ["By the", " win"]
    assert (last["answered_by"], last["urgent"]) == ("person", True)
    assert "colleague" in last["reply"]


def test_examples_are_written_once_and_each_intent_has_several():
    texts = [text.lower() for entry in intents().values() for text in entry["examples"]]
    assert len(set(texts)) == len(texts) >= 8 * len(intents())
    assert not {*texts} & {message.lower() for message in KNOWN}
    assert verdict_schema()["properties"]["intent"]["enum"] == [*intents(), OTHER]
    assert Intents("nowhere").k < len(texts)
