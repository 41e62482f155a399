"""Engines with replicas of their own on Ray Serve: the support graph, and the OpenAI API of an
engine whose replicas are chosen by the beginning of a prompt."""

import asyncio
import functools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pandas as pd
import psutil
import pytest
import yaml

from graphs.support import SURE, support
from graphs.support_model.nodes import verdict_schema
from llm import models
from llm.conftest import ENVIRONMENT, SERVED
from llm.leaving import (
    LENGTH,
    OFTEN,
    hang_up_on_streams,
    hang_up_on_whole_answers,
    leaves_nothing,
    long_answer,
    nothing_is_left,
    tokens_written,
    vllm_counts,
)
from llm.processes import engines_of, replicas_of, rest_within
from llm.test_served import events, many_streams, running, until, written
from llm.test_support import KNOWN, STRANGE
from twinpath.nodes.llm_metrics import EXPORTED
from twinpath.online.gateway.keys import new_key, write_keys
from twinpath.online.session import ServeSession

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
HERE = Path(__file__).parent
ROOT = HERE.parent.parent
ENGINE = SERVED | {
    "block_size": 32,
    "enable_prefix_caching": True,
}
REPLY_CHARS = 20
#: In an order in which sure and unsure ones alternate at first.
MESSAGES = [m for pair in zip(STRANGE, KNOWN, strict=False) for m in pair] + [*KNOWN][5:]


@pytest.fixture(scope="module")
def session(llama: Path, minilm: Path) -> Iterator[ServeSession]:
    """The support graph below ``/support``, and two replicas of a Llama below ``/chat``, whose
    engine is placed by the config; below ``/guarded`` what ``deployments/llm.yaml`` serves, for
    callers with keys."""
    env = {
        **ENVIRONMENT, **OFTEN, "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING",
        "TWINPATH_TEST_LLAMA": str(llama), "TWINPATH_TEST_MINILM": str(minilm),
        "TWINPATH_TEST_ENGINE": json.dumps(ENGINE),
        "TWINPATH_TEST_OPENAI": json.dumps({"enable_prompt_tokens_details": True}),
    }  # fmt: skip
    placed = {"num_cpus": 0.1, "replicas": {"min": 2, "max": 2}}
    one = placed | {"replicas": {"min": 1, "max": 1}}
    applications = [
        {
            "name": app,
            "route_prefix": f"/{app}",
            "import_path": f"{module}:{app}_app",
            "args": {"ingress": {"num_cpus": 0.1}, "nodes": {"llm": args}},
        }
        for app, module, args in (
            ("support", "support_for_tests", one), ("chat", "llm_graph_for_tests", placed),
        )
    ]  # fmt: skip
    with ServeSession(num_cpus=8, pythonpath=[ROOT / "platform", ROOT, HERE], env=env) as running:
        write_keys(running.folder / "keys", [])
        applications.append(shipped(llama, running.folder / "keys"))
        config = running.folder / "config.yaml"
        config.write_text(yaml.safe_dump({"applications": applications}))
        running.deploy(config, timeout_s=300)
        running.wait_until_ready(*(f"/{app['name']}/readyz" for app in applications))
        yield running


def shipped(model: Path, keys: Path) -> dict[str, Any]:
    """The application of ``deployments/llm.yaml`` with this model, which is not compiled, and the
    gateway that the file proposes."""
    [app] = yaml.safe_load((ROOT / "deployments" / "llm.yaml").read_text())["applications"]
    variables = app["runtime_env"]["env_vars"]
    engine = json.loads(variables["TWINPATH_CHAT_ENGINE"])
    variables |= {
        "TWINPATH_CHAT_MODEL": str(model), "VLLM_CPU_KVCACHE_SPACE": "1",
        "TWINPATH_CHAT_ENGINE": json.dumps(engine | {"enforce_eager": True, "dtype": "float32"}),
    }  # fmt: skip
    app["args"]["ingress"] = {"num_cpus": 0.1}
    app["args"]["gateway"] = {"api_keys": str(keys), "limits": {"tokens": "1/day"}}
    return app | {"name": "guarded", "route_prefix": "/guarded"}


def ask(session: ServeSession, messages: list[str]) -> list[dict[str, Any]]:
    """The support graph's replies."""
    body = {"rows": [{"message": message} for message in messages]}
    answer = httpx.post(f"{session.url}/support/predict", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    rows: list[dict[str, Any]] = answer.json()["rows"]
    return rows


def test_examples_answer_what_is_certain_and_the_model_the_rest_in_its_schema(session):
    replies = dict(zip(MESSAGES, ask(session, MESSAGES), strict=True))
    for message, intent in KNOWN.items():
        reply = replies[message]
        assert (reply["answered_by"], reply["intent"]) == ("examples", intent)
        assert (reply["completion_tokens"], reply["confidence"] >= SURE) == (0, True)
    fields = verdict_schema(REPLY_CHARS)["properties"]
    for message in STRANGE:
        reply = replies[message]
        assert (reply["answered_by"], reply["confidence"] < SURE) == ("model", True)
        assert reply["completion_tokens"] > 0
        assert reply["intent"] in fields["intent"]["enum"]
        assert 1 <= len(reply["reply"]) <= REPLY_CHARS


def test_a_reply_is_streamed_out_of_the_graphs_last_node(session):
    whole = dict(zip(MESSAGES, ask(session, MESSAGES), strict=True))
    for message in (STRANGE[0], STRANGE[1], next(iter(KNOWN))):
        url = f"{session.url}/support/v2/models/support/generate_stream"
        answer = httpx.post(url, json={"message": message}, timeout=120)
        assert answer.headers["content-type"].startswith("text/event-stream"), answer.text
        parts = events(answer.text)
        text = "".join(part["reply"] for part in parts)
        assert parts[-1] | {"reply": text} == whole[message] | {
            "confidence": parts[-1]["confidence"]
        }
        assert parts[-1]["confidence"] == pytest.approx(whole[message]["confidence"], abs=1e-4)
        assert (len(parts) > 1) == (message in STRANGE)


def test_the_same_answers_come_in_process_online_and_from_a_job(session, llama, minilm, tmp_path):
    online = ask(session, MESSAGES)
    graph = support(
        str(minilm), str(llama), engine=ENGINE, environment=ENVIRONMENT,
        max_reply_chars=REPLY_CHARS, fused=True,
    )  # fmt: skip
    try:
        here = graph.run([{"message": message} for message in MESSAGES]).rows()
    finally:
        graph.close()
    frame = pd.DataFrame({"id": range(len(MESSAGES)), "message": MESSAGES})
    frame.to_parquet(tmp_path / "messages.parquet")
    script = str(HERE / "support_for_tests.py")
    session.command(
        Path(sys.executable).name, script, str(tmp_path / "messages.parquet"),
        str(tmp_path / "replies"), timeout_s=240,
    )  # fmt: skip
    read = pd.read_parquet(tmp_path / "replies").sort_values("id")
    job = read[list(online[0])].to_dict("records")
    for row in (*online, *here, *job):
        row["confidence"] = pytest.approx(row["confidence"], abs=1e-4)
    assert job == online
    assert here == online


def chat(prompt: str, **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": 8} | more


def cached(answer: dict[str, Any]) -> int:
    """Tokens of a prompt that the engine had read before."""
    details = answer["usage"]["prompt_tokens_details"]
    return 0 if details is None else int(details["cached_tokens"] or 0)


def test_prompts_that_begin_alike_come_to_the_engine_that_has_read_their_beginning(session):
    beginnings = [f"{topic}: " + " ".join(models.WORDS[topic:] * 3) for topic in range(8)]
    with httpx.Client(base_url=f"{session.url}/chat", timeout=120) as client:

        def read(body: dict[str, Any], path: str = "/v1/completions") -> int:
            answer = client.post(path, json=body)
            assert answer.status_code == 200, answer.text
            return cached(answer.json())

        found = [
            [read(chat(f"{beginning} {turn}")) for turn in range(4)] for beginning in beginnings
        ]
        assert [sum(tokens == 0 for tokens in each) for each in found] == [1] * 8
        assert all(tokens >= 64 for each in found for tokens in each[1:]), found
        messages = [{"role": "system", "content": "chat " + beginnings[0]}]
        for turn in range(4):
            messages.append({"role": "user", "content": f"and {turn}?"})
            body = {"model": "tiny", "messages": messages, "max_tokens": 2}
            assert (read(body, "/v1/chat/completions") > 0) == (turn > 0)


def test_a_session_stays_with_its_engine_and_beginnings_that_many_ask_for_come_to_both(session):
    beginnings = [f"{topic} in all: " + " ".join(models.WORDS[topic:] * 3) for topic in range(6)]

    async def read(prompts: list[str], **more: Any) -> list[int]:
        """All at once: the tokens of each that were read before."""
        url = f"{session.url}/chat"
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            asked = [client.post("/v1/completions", json=chat(p, **more)) for p in prompts]
            return [cached(answer.json()) for answer in await asyncio.gather(*asked)]

    def one_by_one(turn: str, **more: Any) -> list[int]:
        return [asyncio.run(read([f"{b} {turn}"], **more))[0] for b in beginnings]

    assert one_by_one("first") == [0] * 6
    first, *others = one_by_one("second", prompt_cache_key="ann")
    assert first > 0, "a new session begins where the prompt's beginning is known"
    assert 0 in others, "and stays there, though another engine knows other beginnings"
    assert all(one_by_one("third", prompt_cache_key="ann"))
    assert all(one_by_one("fourth"))

    hot = "hot: " + " ".join(models.WORDS * 3)
    assert asyncio.run(read([hot])) == [0]
    many = asyncio.run(read([f"{hot} {n}" for n in range(32)], max_tokens=200, ignore_eos=True))
    assert 0 in many, "the other engine helps, and had not read it"
    assert sum(tokens > 0 for tokens in many) >= 8


def test_what_engines_measure_of_themselves_is_among_rays_metrics(session):
    for _ in range(2):
        body = chat("the same beginning for all " * 8, max_tokens=8)
        answer = httpx.post(f"{session.url}/chat/v1/completions", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
    tokens_written(session)
    series: dict[str, dict[str, float]] = {}
    for name in EXPORTED:
        kinds = [name.removeprefix("vllm:") + part for part in ("", "_total", "_count")]
        [series[name]] = [found for kind in kinds if (found := vllm_counts(session, kind))]
        assert len(series[name]) == 2, f"{name} of both replicas"
    at_rest = {"num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"}
    still = {
        name.removeprefix("vllm:") for name, found in series.items() if not sum(found.values())
    }
    assert still == at_rest | {"num_preemptions"}
    whole = vllm_counts(session, "inter_token_latency_seconds_sum")
    assert sum(whole.values()) > 0


def test_a_placed_engine_has_the_openai_api_of_the_graph(session):
    with httpx.Client(base_url=f"{session.url}/chat", timeout=120) as client:
        [model] = client.get("/v1/models").json()["data"]
        assert model["id"] == "tiny"
        whole = client.post("/v1/completions", json=chat("why is it late", max_tokens=24)).json()
        streamed = chat("why is it late", max_tokens=24, stream=True)
        streamed["stream_options"] = {"include_usage": True}
        with client.stream("POST", "/v1/completions", json=streamed) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            found = events("\n".join(answer.iter_lines()))
        assert written(found) == whole["choices"][0]["text"]
        assert found[-1] == "[DONE]"
        assert found[-2]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
        for body, status in (
            (chat("hello") | {"model": "other"}, 404),
            (chat("late " * 600), 400),
            (chat("hello") | {"temperature": -1}, 400),
        ):
            refused = client.post("/v1/completions", json=body)
            assert refused.status_code == status
            assert refused.json()["error"]["message"]
        assert client.post("/v1/completions", content=b"{").status_code in (400, 422)
        tokens = client.post("/tokenize", json={"model": "tiny", "prompt": "hello"}).json()
        assert tokens["count"] == len(tokens["tokens"]) > 0


def generated(session: ServeSession, prompt: str) -> list[dict[str, Any]]:
    """The events of the graph's own stream."""
    url = f"{session.url}/chat/v2/models/writer/generate_stream"
    with httpx.stream("POST", url, json={"prompt": prompt}, timeout=120) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        return events("\n".join(answer.iter_lines()))


def test_the_last_node_of_a_graph_streams_over_http_what_predict_answers(session):
    streams = [generated(session, prompt) for prompt in models.prompts(4)]
    rows = {"rows": [{"prompt": prompt} for prompt in models.prompts(4)]}
    whole = httpx.post(f"{session.url}/chat/predict", json=rows, timeout=120).json()["rows"]
    assert max(map(len, streams)) > 2
    for stream, row in zip(streams, whole, strict=True):
        assert "".join(event["text"] for event in stream) == row["text"]
        assert stream[-1]["finish_reason"] == row["finish_reason"] != ""


def test_a_model_that_is_unloaded_is_so_for_streams_and_the_openai_api(session):
    asked = {
        "/v1/completions": chat("hello"), "/v1/completions?": chat("hello", stream=True),
        "/v2/models/writer/generate_stream": {"prompt": "hello"},
        "/predict": {"rows": [{"prompt": "hello"}]},
    }  # fmt: skip
    with httpx.Client(base_url=f"{session.url}/chat", timeout=120) as client:
        for change, status in (("unload", 503), ("load", 200)):
            told = client.post(f"/v2/repository/models/writer/{change}")
            assert told.status_code == 200, told.text
            found = {path: client.post(path, json=body) for path, body in asked.items()}
            assert {answer.status_code for answer in found.values()} == {status}, found
            retry = {answer.headers.get("retry-after") for answer in found.values()}
            assert retry == ({"5"} if change == "unload" else {None})


def test_a_hundred_clients_that_hang_up_leave_the_placed_engines_nothing_to_write(session):
    leaves_nothing(session, hang_up_on_streams)


def test_clients_that_hang_up_on_a_whole_answer_leave_the_placed_engines_nothing_to_write(session):
    leaves_nothing(session, hang_up_on_whole_answers)


def test_deadlines_end_the_sequences_of_placed_engines(session):
    choices = 400

    async def late(client: httpx.AsyncClient, stream: bool) -> httpx.Response:
        body = long_answer(int(stream), n=choices, stream=stream)
        headers = {"X-Request-Timeout-Ms": "300"}
        return await client.post("/v1/completions", json=body, headers=headers)

    async def both() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=f"{session.url}/chat", timeout=120) as client:
            return await asyncio.gather(late(client, False), late(client, True))

    first, second = engines_of(session, "chat")
    before = tokens_written(session)
    whole, streamed = asyncio.run(both())
    assert rest_within((first, second), 1), "one of them was not ended"
    assert whole.status_code == 504
    assert all("deadline_exceeded" in answer.text for answer in (whole, streamed))
    assert tokens_written(session) - before < choices * LENGTH / 2, "one of them was not ended"
    assert nothing_is_left(session)


def test_examples_answer_while_the_engine_is_replaced(session):
    before = ask(session, MESSAGES)
    [engine] = engines_of(session, "support")
    engine.kill()
    rows = {"rows": [{"message": message} for message in MESSAGES]}
    url = f"{session.url}/support/predict?on_error=partial"
    mixed = httpx.post(url, json=rows, timeout=120).json()
    assert [row is not None for row in mixed["rows"]] == [m in KNOWN for m in MESSAGES]
    assert {error["code"] for error in mixed["errors"]} == {"retry_later"}
    known = ask(session, [*KNOWN])
    assert {reply["answered_by"] for reply in known} == {"examples"}
    body = {"rows": [{"message": STRANGE[0]}]}
    seen = []

    def answered() -> bool:
        answer = httpx.post(f"{session.url}/support/predict", json=body, timeout=120)
        seen.append(answer)
        return answer.status_code == 200

    until(answered, 120, "the model answers again")
    assert {a.status_code for a in seen[:-1]} <= {503}
    assert ask(session, MESSAGES) == before
    psutil.wait_procs([engine], timeout=30)
    assert not engine.is_running()


@pytest.mark.parametrize("victim", ["replica", "engine"])
def test_a_killed_replica_or_engine_ends_whole_and_no_stream_of_the_other(session, victim):
    url = f"{session.url}/chat"
    whole = asyncio.run(many_streams(url, 12, lambda: None))
    assert all(stream[-1] == "[DONE]" for stream in whole)
    before = running(session, "llm")
    assert len(before) == 2
    first, _ = replicas_of(session, "chat", "llm")
    of_first = first.children(recursive=True)
    engine, _ = engines_of(session, "chat")
    assert engine in of_first
    found = asyncio.run(many_streams(url, 12, (first if victim == "replica" else engine).kill))
    good = [stream for stream in found if written(stream) in map(written, whole)]
    broken = [stream for stream in found if stream not in good]
    assert good, "streams of the other replica are whole"
    assert broken, "and those of the killed one are not"
    for stream in broken:
        errors = [e["error"] for e in stream if isinstance(e, dict) and "error" in e]
        assert errors, stream[-3:]
        assert victim == "engine" or [error["code"] for error in errors] == ["retry_later"]
        assert stream[-1] == "[DONE]"
    _, left = psutil.wait_procs([first, *of_first], timeout=30)
    assert left == [], "the replica and its engine's processes are gone"

    def replaced() -> bool:
        now = running(session, "llm")
        return len(now) == 2 and now != before

    until(replaced, 120, "another one")


def key_for(session: ServeSession, name: str) -> dict[str, str]:
    """Headers of a new caller of ``/guarded``, whose key is known there by now."""
    key, record = new_key(name, ("chat",))
    write_keys(session.folder / "keys", [record])
    until(lambda: known_to(session, key), 20, "the key is known")
    return {"Authorization": f"Bearer {key}"}


def known_to(session: ServeSession, key: str) -> bool:
    """Whether ``/guarded`` takes a key."""
    known = {"Authorization": f"Bearer {key}"}
    return httpx.get(f"{session.url}/guarded/v1/models", headers=known).is_success


def test_tokens_of_placed_engines_are_charged(session):
    row = {"messages": json.dumps([{"role": "user", "content": "hello"}]), "max_tokens": 4}
    asked = {"/v1/completions": chat("hello") | {"model": "chat"}, "/predict": {"rows": [row]}}
    with httpx.Client(base_url=f"{session.url}/guarded", timeout=120) as client:
        assert client.get("/v1/models").status_code == 401
        for path, body in asked.items():
            known = key_for(session, path)
            found = [client.post(path, json=body, headers=known).status_code for _ in range(2)]
            assert found == [200, 429], path


def test_a_new_config_replaces_an_engine_and_no_stream_ends_early(session):
    """The engine that is replaced writes to its end what it has begun, and leaves nothing."""
    config = session.folder / "config.yaml"
    changed = yaml.safe_load(config.read_text())
    changed["applications"][-1]["args"]["ingress"]["num_cpus"] = 0.2
    [old] = replicas_of(session, "guarded", "llm")
    of_old = old.children(recursive=True)
    # A day's tokens are enough for one answer, so each has a caller of its own.
    made = [new_key(f"caller {number}", ("chat",)) for number in range(3000)]
    write_keys(session.folder / "keys", [record for _, record in made])
    keys = [key for key, _ in made]
    streams: list[list[Any]] = []
    over = asyncio.Event()
    body = chat("hello", max_tokens=LENGTH, ignore_eos=True, stream=True) | {"model": "chat"}

    async def caller(client: httpx.AsyncClient) -> None:
        while not over.is_set():
            known = {"Authorization": f"Bearer {keys.pop()}"}
            async with client.stream("POST", "/v1/completions", json=body, headers=known) as answer:
                lines = [line async for line in answer.aiter_lines()]
            assert answer.status_code == 200, lines
            streams.append(events("\n".join(lines)))

    async def ask_meanwhile() -> None:
        url = f"{session.url}/guarded"
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            callers = [asyncio.create_task(caller(client)) for _ in range(4)]
            config.write_text(yaml.safe_dump(changed))
            await asyncio.to_thread(session.deploy, config, timeout_s=240)
            gone = functools.partial(psutil.wait_procs, [old, *of_old], timeout=60)
            _, left = await asyncio.to_thread(gone)
            assert left == [], "the engine's processes are gone"
            before = len(streams)
            async with asyncio.timeout(60):
                while len(streams) < before + 8:  # noqa: ASYNC110  # streams have no event
                    await asyncio.sleep(0.1)
            over.set()
            await asyncio.gather(*callers)

    until(lambda: known_to(session, keys[0]), 20, "the keys are known")
    keys.pop(0)
    asyncio.run(ask_meanwhile())
    for stream in streams:
        assert stream[-1] == "[DONE]", stream[-3:]
        ends = [choice["finish_reason"] for event in stream[:-1] for choice in event["choices"]]
        assert ends[-1] == "length"
    assert len(set(map(written, streams))) == 1
    assert old not in replicas_of(session, "guarded", "llm")


def test_sequences_that_an_engine_has_to_write_bring_another_replica(session):
    """The last one: the other replica starts while the session ends."""
    known = key_for(session, "many")
    assert len(replicas_of(session, "guarded", "llm")) == 1

    async def ask() -> None:
        async with httpx.AsyncClient(base_url=f"{session.url}/guarded", headers=known) as client:
            # Seven requests: by their number one replica would do, by their sequences it does not.
            asking = [
                asyncio.create_task(
                    client.post(
                        "/v1/completions", json=long_answer(n, n=16, model="chat"), timeout=120
                    )
                )
                for n in range(7)
            ]
            deadline_s = time.monotonic() + 60
            while len(replicas_of(session, "guarded", "llm")) < 2:
                assert time.monotonic() < deadline_s, [task.done() for task in asking]
                assert not all(task.done() for task in asking)
                await asyncio.sleep(0.5)
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)

    asyncio.run(ask())
