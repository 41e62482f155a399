"""Answers as they come, of graphs whose last node streams."""

import asyncio
import contextlib
import json
import time
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from pydantic import BaseModel, Field

from twinpath import Graph, Node, col
from twinpath.errors import GraphError, InputError, NodeContractError, RowFailedError
from twinpath.graph.columns import ROW_ERROR
from twinpath.graph.streaming import StreamingExecutor, first_row, streaming_steps


class Ask(BaseModel):
    text: str = Field(min_length=1)


class Told(BaseModel):
    word: str
    loud: str


class Loud(Node):
    inputs = {"text": "str"}
    outputs = {"loud": "str"}

    def predict(self, columns):
        if (columns["text"] == "bad").any():
            raise ValueError("bad")
        return {"loud": np.array([text.upper() for text in columns["text"]], dtype=object)}


class Words(Node):
    """Streams its words; notes when it was closed before its end."""

    inputs = {"loud": "str"}
    outputs = {"word": "str"}
    closed = False

    async def predict(self, columns):
        return {"word": columns["loud"]}

    async def stream(self, columns):
        try:
            for number, word in enumerate(columns["loud"][0].split(), 1):
                if word == "LATER":
                    raise InputError("it broke off")
                if word == "ODD":
                    raise ValueError("odd")
                yield {"word": np.array([word], dtype=object), "__note_tokens": np.array([number])}
                await asyncio.sleep(0)
        except (GeneratorExit, asyncio.CancelledError):
            Words.closed = True
            raise


def graph(writer=None, **options):
    made = Graph("words", input=Ask, output=Told)
    with made as row:
        made.output((writer or Words())(Loud()(row), **options))
    return made


class Letters(Node):
    """Follows words: their letters so far, and how many batches there were."""

    inputs = {"word": "str", "text": "str"}
    outputs = {"letters": "int64"}
    hasty = False

    def predict(self, columns):
        return {"letters": np.array([len(word or "") for word in columns["word"]])}

    async def follow(self, batches):
        if Letters.hasty:
            yield {"letters": np.array([0])}
        seen = 0
        async for columns in batches:
            assert columns["text"][0], "no text"
            if columns["word"][0] == "WRONG":
                raise ValueError("wrong")
            seen += self.predict(columns)["letters"][0]
            if columns["word"][0] == "HELD":
                continue
            errors = np.array(["no letters" if seen == 0 else None], dtype=object)
            yield {
                "letters": np.array([seen]),
                ROW_ERROR: errors,
                "__note_tokens": np.array([seen]),
            }


class Counted(BaseModel):
    word: str | None
    letters: int


def followed(*, also: bool = False, alone: bool = False, **options):
    made = Graph("words", input=Ask, output=Counted)
    with made as row:
        loud = Loud()(row)
        words = Words()(loud, **options)
        other = Letters()(words) if also else loud
        made.output(Letters()(words) if alone else Letters()(other, words))
    return made


def text(value: str):
    return {"text": np.array([value], dtype=object)}


@pytest.fixture
def executor():
    made = StreamingExecutor(graph().plan)
    made.setup()
    yield made
    made.teardown()


async def collect(executor, value):
    return [first_row(part.columns) async for part in executor.stream(text(value))]


async def test_each_part_is_a_whole_output_row(executor):
    parts = await collect(executor, "one two")
    assert parts == [{"word": "ONE", "loud": "ONE TWO"}, {"word": "TWO", "loud": "ONE TWO"}]


async def parts_of(graph, value):
    executor = StreamingExecutor(graph.plan)
    executor.setup()
    try:
        return await collect(executor, value)
    finally:
        executor.teardown()


async def test_a_node_that_follows_gets_each_part_and_writes_its_own():
    parts = await parts_of(followed(), "one three")
    assert parts == [{"word": "ONE", "letters": 3}, {"word": "THREE", "letters": 8}]


async def test_a_row_that_is_kept_from_the_streaming_node_is_followed_once():
    some = followed(where=col("loud") != "X", default={"word": "none"})
    assert await parts_of(some, "x") == [{"word": "none", "letters": 4}]
    assert await parts_of(some, "y") == [{"word": "Y", "letters": 1}]
    with pytest.raises(NodeContractError, match="no branch of the graph gave this row"):
        await parts_of(followed(alone=True, where=col("loud") != "X"), "x")


@pytest.mark.parametrize(("word", "error"), [("odd", "'words': V"), ("wrong", "'letters': V")])
async def test_what_a_node_raises_in_the_middle_is_the_row_s_error(word: str, error: str):
    with pytest.raises(RowFailedError, match=f"node {error}alueError: {word}"):
        await parts_of(followed(), f"one {word}")
    with pytest.raises(InputError, match="it broke off"):
        await parts_of(followed(), "one later")


async def test_a_node_that_follows_is_held_to_its_contract(monkeypatch):
    nothing = followed(where=col("loud") != "X", default={"word": ""})
    with pytest.raises(RowFailedError, match="node 'letters': no letters"):
        await parts_of(nothing, "x")
    monkeypatch.setattr(Letters, "hasty", True)
    with pytest.raises(NodeContractError, match="before it had read a batch"):
        await parts_of(followed(), "one")


@pytest.mark.parametrize("value", ["one two", "one held", "held", "one odd"])
async def test_what_nodes_note_is_told_also_where_no_part_comes(value: str):
    executor = StreamingExecutor(followed().plan)
    executor.setup()
    notes: dict = {}
    with contextlib.suppress(RowFailedError):
        async for _ in executor.stream(text(value), notes):
            pass
    words = [word for word in value.upper().split() if word != "ODD"]
    found = {node: noted["tokens"].tolist() for node, (_, noted) in notes.items()}
    letters = [len("".join(words[: words.index("HELD")] if "HELD" in words else words))]
    assert found.pop("letters", [0]) == letters
    assert found == {"words": [len(words)]}


async def test_who_stops_reading_what_follows_closes_the_streaming_node():
    Words.closed = False
    other = StreamingExecutor(followed().plan)
    other.setup()
    parts = other.stream(text("one two three"))
    await anext(parts)
    await parts.aclose()
    assert Words.closed


async def test_a_condition_that_fails_is_the_row_s_error():
    with pytest.raises(RowFailedError, match="bad"):
        await parts_of(followed(where=col("loud") != "X"), "bad")
    odd = followed(where=col("loud") > 5)
    with pytest.raises(RowFailedError, match="where="):
        await parts_of(odd, "one")


def test_only_one_reader_of_a_streaming_node_follows_it():
    assert streaming_steps(followed(also=True).plan) is None


async def test_a_row_that_fails_before_the_last_node_raises_its_error(executor):
    with pytest.raises(RowFailedError, match="node 'loud': ValueError: bad"):
        await collect(executor, "bad")


async def test_who_stops_reading_closes_the_node_s_generator(executor):
    Words.closed = False
    parts = executor.stream(text("one two three"))
    await anext(parts)
    await parts.aclose()
    assert Words.closed


async def test_several_rows_and_graphs_without_a_streaming_last_node_are_refused(executor):
    with pytest.raises(InputError, match="one row can be streamed at a time, got 2"):
        await anext(executor.stream({"text": np.array(["a", "b"], dtype=object)}))
    branch = graph(where=col("loud") != "X", default={"word": "none"})
    assert streaming_steps(branch.plan) is None
    other = StreamingExecutor(branch.plan)
    with pytest.raises(GraphError, match="graph 'words' cannot be streamed"):
        await anext(other.stream(text("a")))


def test_a_row_is_plain_values_and_nan_is_null():
    columns = {"a": np.array([np.nan]), "b": np.array([[1, 2]]), "c": np.array([True])}
    assert first_row(columns) == {"a": None, "b": [1, 2], "c": True}


async def test_over_http_the_parts_are_events_and_errors_keep_their_status(executor):
    pytest.importorskip("starlette")
    from starlette.applications import Starlette

    from twinpath.online.protocols.generate_stream import stream_routes

    app = Starlette(routes=stream_routes(executor.plan, executor, max_body_bytes=100))
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:

        async def post(body) -> httpx.Response:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            return await client.post("/v2/models/words/generate_stream", content=content)

        good = await post({"text": "one two"})
        assert good.headers["content-type"].startswith("text/event-stream")
        events = [json.loads(event[6:]) for event in good.text.split("\n\n") if event]
        assert [event["word"] for event in events] == ["ONE", "TWO"]

        late = (await post({"text": "one later"})).text.split("\n\n")
        assert json.loads(late[1][6:]) == {"error": "it broke off", "code": "invalid_input"}

        for body, status, code in (
            (b"{", 400, "malformed_body"), ([1], 422, "invalid_input"),
            ({"text": ""}, 422, "invalid_input"), ({"text": "bad"}, 422, "row_failed"),
            ({"text": "x" * 200}, 413, "body_too_large"),
        ):  # fmt: skip
            answer = await post(body)
            assert (answer.status_code, answer.json()["code"]) == (status, code)


async def test_over_http_no_stream_begins_that_is_not_let_in(executor):
    pytest.importorskip("starlette")
    from starlette.applications import Starlette

    from twinpath.errors import OverloadedError
    from twinpath.online.protocols.generate_stream import stream_routes

    def admit() -> None:
        raise OverloadedError("model 'words' is unloaded: load it first", 5.0)

    transport = httpx.ASGITransport(
        Starlette(routes=stream_routes(executor.plan, executor, 100, admit))
    )
    async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
        answer = await client.post("/v2/models/words/generate_stream", json={"text": "one"})
    assert (answer.status_code, answer.json()["code"]) == (503, "overloaded")
    assert answer.headers["retry-after"] == "5"


async def test_over_http_each_stream_is_charged_and_who_leaves_before_it_began_ends_it():
    pytest.importorskip("starlette")
    from twinpath.online.gateway.middleware import SPENT
    from twinpath.online.protocols.generate_stream import stream_routes

    executor = StreamingExecutor(followed().plan)
    executor.setup()
    [route] = stream_routes(executor.plan, executor, max_body_bytes=100)

    async def ask(body: dict, leave: bool = False) -> tuple[int, list[int]]:
        spent: list[int] = []
        given = iter([{"type": "http.request", "body": json.dumps(body).encode()}])
        sent = []

        async def receive():
            message = next(given, None)
            if message is None and not leave:
                await asyncio.sleep(60)
            return message or {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        scope = {
            "type": "http", "method": "POST", "path": route.path, "headers": [],
            "query_string": b"", SPENT: spent.append, "asgi": {"spec_version": "2.4"},
        }  # fmt: skip
        await asyncio.wait_for(route.handle(scope, receive, send), 5)
        return sent[0]["status"], spent

    assert await ask({"text": "one two"}) == (200, [2 + 6])
    assert await ask({"text": "held one odd"}) == (200, [2 + 7])
    assert await ask({"text": "held odd"}) == (422, [1])
    Words.closed = False
    status, spent = await ask({"text": "held " * 15}, leave=True)
    assert (status, Words.closed) == (499, True)
    assert 1 <= spent[0] < 15


async def test_over_http_a_deadline_ends_a_stream_before_and_after_its_first_part():
    pytest.importorskip("starlette")
    from starlette.applications import Starlette

    from twinpath.online.gateway.middleware import ASK
    from twinpath.online.protocols.generate_stream import stream_routes

    class Slow(Words):
        async def stream(self, columns):
            try:
                for word in columns["loud"][0].split():
                    await asyncio.sleep(30 if word == "SLOW" else 0)
                    yield {"word": np.array([word], dtype=object)}
            except (GeneratorExit, asyncio.CancelledError):
                Words.closed = True
                raise

    executor = StreamingExecutor(graph(Slow()).plan)
    executor.setup()
    routes = Starlette(routes=stream_routes(executor.plan, executor, max_body_bytes=100))

    async def app(scope, receive, send):
        ask = SimpleNamespace(deadline_s=time.monotonic() + 1)
        await routes({**scope, ASK: ask}, receive, send)

    url = "/v2/models/words/generate_stream"
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
        Words.closed = False
        early = await client.post(url, json={"text": "slow"})
        assert (early.status_code, early.json()["code"]) == (504, "deadline_exceeded")
        assert Words.closed
        Words.closed = False
        late = await client.post(url, json={"text": "one slow"})
        first, second, _ = late.text.split("\n\n")
        assert json.loads(first[6:])["word"] == "ONE"
        assert json.loads(second[6:])["code"] == "deadline_exceeded"
        assert Words.closed
        assert (await client.post(url, json={"text": "one"})).status_code == 200


def test_a_graph_that_cannot_be_streamed_has_no_route():
    pytest.importorskip("starlette")
    from twinpath.online.protocols.generate_stream import stream_routes

    branch = graph(where=col("loud") != "X", default={"word": "none"})
    assert stream_routes(branch.plan, StreamingExecutor(branch.plan), 100) == []


async def test_the_description_has_the_stream_where_there_is_one(executor):
    pytest.importorskip("starlette")
    from twinpath.online.app import graph_app
    from twinpath.online.batcher import Batcher
    from twinpath.online.protocols.generate_stream import stream_routes

    path = "/v2/models/words/generate_stream"
    for routes in (stream_routes(executor.plan, executor, 1000), []):
        batcher = Batcher(executor.run, executor.plan.placement.batch)
        app = graph_app(executor.plan, batcher, max_body_bytes=1000, more_routes=routes)
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://t"
        ) as client:
            described = (await client.get("/openapi.json")).json()["paths"]
            answer = await client.post(path, json={"text": "one"})
        assert (path in described) is (answer.status_code == 200) is bool(routes)
        if routes:
            [media] = described[path]["post"]["responses"]["200"]["content"]
            assert answer.headers["content-type"].startswith(media)
