"""What the router reads of a request to the OpenAI API of a placed engine."""

import json
from typing import Any

import pytest

from twinpath.online.protocols.openai_remote import columns

ROUTED = {"column": "prompt", "session": "user"}
CHAT = [{"role": "user", "content": "hello"}]


def read(body: dict[str, Any], routed_by: dict[str, str | None] = ROUTED) -> dict[str, Any]:
    found = columns(json.dumps(body).encode(), routed_by)
    return {name: values.tolist() for name, values in found.items()}


@pytest.mark.parametrize(
    ("body", "beginning"),
    [
        ({"prompt": "hello"}, "hello"),
        ({"input": "one", "instructions": "Be short. "}, "Be short. one"),
        ({"messages": CHAT, "system": "S"}, 'S[{"role":"user","content":"hello"}]'),
        ({"prompt": [1, 2]}, "[1,2]"),
        ({"text_1": "one", "text_2": "two"}, "one"),
        ({}, ""),
    ],
)
def test_a_request_is_known_by_what_its_prompt_begins_with(body, beginning):
    assert read(body) == {"prompt": [beginning]}


def test_a_session_is_known_by_its_cache_key_where_the_node_routes_by_one():
    body = {"prompt": "hello", "prompt_cache_key": "ann"}
    assert read(body) == {"prompt": ["hello"], "user": ["ann"]}
    assert read(body, ROUTED | {"session": None}) == {"prompt": ["hello"]}
    assert read(body | {"prompt_cache_key": 7}) == {"prompt": ["hello"]}


@pytest.mark.parametrize("body", [b"{", b"[1]", b'"text"', b""])
def test_what_the_engine_will_refuse_goes_anywhere(body):
    assert columns(body, ROUTED) == {}
    assert columns(b'{"prompt": "hello"}', None) == {}
