"""An engine with two replicas on Serve, beside `vllm serve` on the same model."""

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import yaml

from llm import models
from llm.conftest import ENVIRONMENT, SERVED
from llm.reference import vllm_serve
from twinpath.online.session import ServeSession

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
TOKENS = 12

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

Answers = dict[str, list[Any]]


@pytest.fixture(scope="module")
def expected(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """What `vllm serve` answers; it is gone before anything else starts."""
    log = tmp_path_factory.mktemp("reference") / "log"
    with vllm_serve(llama, SERVED, ENVIRONMENT, log) as url:
        return ask_everything(url)


@pytest.fixture(scope="module")
def session(llama: Path, expected: Answers) -> Iterator[ServeSession]:
    """Two replicas of the graph."""
    env = {"TWINPATH_TEST_LLAMA": str(llama), "VLLM_LOGGING_LEVEL": "WARNING"}
    paths = [ROOT / "platform", ROOT, ROOT / "tests", HERE]
    with ServeSession(num_cpus=8, pythonpath=paths, env=env) as session:
        application = {
            "name": "chat",
            "route_prefix": "/",
            "import_path": "llm_graph_for_tests:app",
            "args": {"ingress": {"num_cpus": 0.1, "replicas": {"min": 2, "max": 2}}},
        }
        config = session.folder / "config.yaml"
        config.write_text(yaml.safe_dump({"applications": [application]}))
        session.deploy(config, timeout_s=400)
        session.wait_until_ready()
        yield session
    assert session.processes() == []


def client(url: str, **more: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120, **more)


def ask_everything(url: str) -> Answers:
    """200 prompts, one after the other, over the endpoints, with OpenAI's own client."""
    api = client(url)
    greedy = {"model": "tiny", "temperature": 0.0}
    texts = models.prompts(200, seed=5)
    chats = [[{"role": "user", "content": text}] for text in texts]
    answers: Answers = {}
    answers["completions"] = [
        api.completions.create(prompt=text, max_tokens=TOKENS, logprobs=2, **greedy).model_dump()
        for text in texts[:50]
    ]
    answers["chat"] = [
        api.chat.completions.create(messages=chat, max_tokens=TOKENS, **greedy).model_dump()
        for chat in chats[50:100]
    ]
    answers["completions, streamed"] = [
        [
            chunk.model_dump()
            for chunk in api.completions.create(
                prompt=text, max_tokens=TOKENS, stream=True, **greedy
            )
        ]
        for text in texts[100:140]
    ]
    answers["chat, streamed"] = [
        [
            chunk.model_dump()
            for chunk in api.chat.completions.create(
                messages=chat, max_tokens=TOKENS, stream=True, logprobs=True, top_logprobs=2,
                stream_options={"include_usage": True}, stop=["late"], **greedy,
            )
        ]
        for chat in chats[140:180]
    ]  # fmt: skip
    answers["responses"] = [
        api.responses.create(input=text, max_output_tokens=TOKENS, **greedy).model_dump()
        for text in texts[180:]
    ]
    answers["several choices, with a seed"] = [
        api.completions.create(
            model="tiny", prompt=text, max_tokens=TOKENS, n=2, temperature=0.7, seed=7
        ).model_dump()
        for text in texts[:5]
    ]
    http = httpx.Client(base_url=url, timeout=60)
    for path in ("/tokenize", "/detokenize"):
        bodies = [{"model": "tiny", "prompt": text, "tokens": [5, 6, 70]} for text in texts[:5]]
        answers[path] = [http.post(path, json=body).json() for body in bodies]
    bad = [{"model": "other", "prompt": "a"}, {"model": "tiny"}, {**greedy, "prompt": "a " * 900}]
    answers["refused"] = [
        [(answer := http.post("/v1/completions", json=body)).status_code, answer.json()]
        for body in bad
    ]
    answers["models"] = [model.model_dump() for model in api.models.list().data]
    return answers


#: What differs from call to call.
_CHANGING = ("id", "created", "created_at", "completed_at", "system_fingerprint", "item_id")


def stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: stable(each) for key, each in value.items() if key not in _CHANGING}
    if isinstance(value, list):
        return [stable(each) for each in value]
    return (
        re.sub(r"(modelperm|chatcmpl|cmpl|resp)-\w+", "", value)
        if isinstance(value, str)
        else value
    )


def shape(value: Any) -> Any:
    """Keys and types, without what they hold."""
    if isinstance(value, dict):
        return {key: shape(each) for key, each in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return type(value).__name__


def written(chunks: list[dict[str, Any]]) -> str:
    parts = [choice for chunk in chunks for choice in chunk["choices"]]
    return "".join(
        (part["delta"]["content"] or "") if "delta" in part else part["text"] for part in parts
    )


@pytest.fixture(scope="module")
def answered(session: ServeSession) -> Answers:
    """What the served graph answers to the same requests."""
    return ask_everything(session.url)


@pytest.mark.parametrize(
    "endpoint",
    [
        "completions",
        "chat",
        "responses",
        "several choices, with a seed",
        "/tokenize",
        "/detokenize",
        "refused",
        "models",
    ],
)
def test_answers_are_those_of_vllm_serve(endpoint: str, expected: Answers, answered: Answers):
    assert expected[endpoint]
    for theirs, ours in zip(stable(expected[endpoint]), stable(answered[endpoint]), strict=True):
        assert ours == theirs


@pytest.mark.parametrize("endpoint", ["completions, streamed", "chat, streamed"])
def test_streams_are_those_of_vllm_serve(endpoint: str, expected: Answers, answered: Answers):
    for theirs, ours in zip(expected[endpoint], answered[endpoint], strict=True):
        assert written(ours) == written(theirs)
        assert shape(ours[0]) == shape(theirs[0])
        assert shape(ours[-1]) == shape(theirs[-1])
        kinds = {json.dumps(shape(chunk), sort_keys=True) for chunk in theirs}
        assert {json.dumps(shape(chunk), sort_keys=True) for chunk in ours} <= kinds
        assert stable(ours[-1]) == stable(theirs[-1])


def test_the_short_way_is_taken_and_counted_by_serve(session: ServeSession):
    """Serve's wrapper would answer with its own request id; ours echoes the caller's."""
    headers = {"X-Request-Id": "abc-1"}
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 2}
    answer = httpx.post(f"{session.url}/v1/completions", json=body, headers=headers, timeout=60)
    assert answer.headers.get_list("x-request-id") == ["abc-1"]


def test_the_engines_metrics_are_exported(session: ServeSession, answered: Answers):
    wanted = (
        "ray_vllm_time_to_first_token_seconds_bucket", "ray_vllm_inter_token_latency_seconds_count",
        "ray_vllm_kv_cache_usage_perc", "ray_vllm_prefix_cache_hits_total",
        "ray_vllm_generation_tokens_total", "ray_vllm_num_requests_waiting",
    )  # fmt: skip

    def exported() -> bool:
        found = json.loads((session.folder / "prom_metrics_service_discovery.json").read_text())
        lines = httpx.get(f"http://{found[0]['targets'][0]}/metrics", timeout=30).text.splitlines()
        return all(any(line.startswith(name) for line in lines) for name in wanted)

    until(exported, 120, "the engine's metrics")


class Stream(threading.Thread):
    """A long stream, and how it ended."""

    def __init__(self, url: str, number: int) -> None:
        super().__init__(daemon=True)
        self._url, self._number = url, number
        self.began = threading.Event()
        self.lines: list[str] = []
        self.broke: Exception | None = None
        self.start()

    def run(self) -> None:
        body = {
            "model": "tiny", "prompt": f"{self._number} hello", "max_tokens": 480, "stream": True,
            "temperature": 0, "ignore_eos": True,
        }  # fmt: skip
        try:
            with httpx.stream(
                "POST", f"{self._url}/v1/completions", json=body, timeout=120
            ) as answer:
                for line in answer.iter_lines():
                    if line:
                        self.lines.append(line)
                        self.began.set()
        except httpx.HTTPError as error:
            self.broke = error
        self.began.set()

    @property
    def failed(self) -> bool:
        return any('"error"' in line for line in self.lines)


@pytest.mark.flaky(reruns=0)
def test_an_engine_that_is_killed_takes_its_own_streams_only_and_is_replaced(
    session: ServeSession,
):
    """Last of this file: it leaves another replica behind."""
    before = engine_cores(session)
    assert len(before) == 2
    streams = [Stream(session.url, number) for number in range(16)]
    for stream in streams:
        assert stream.began.wait(60)
    os.kill(before[0].pid, signal.SIGKILL)
    for stream in streams:
        stream.join(120)
        assert not stream.is_alive()
    hurt = [stream for stream in streams if stream.failed]
    well = [stream for stream in streams if not stream.failed]
    assert hurt, "no stream was on the engine that was killed"
    assert well, "every stream was hurt"
    for stream in streams:
        assert stream.broke is None
        assert stream.lines[-1] == "data: [DONE]"
    # Callers that come now get their answer from the other one; the client tries a 503 again.
    api = client(session.url, max_retries=5)
    for _ in range(5):
        assert api.completions.create(model="tiny", prompt="hello", max_tokens=2).choices

    def replaced() -> bool:
        now = {core.pid for core in engine_cores(session)}
        return len(now) == 2 and before[0].pid not in now and before[1].pid in now

    until(replaced, 300, "a replica in place of the one whose engine was killed")
    until(lambda: running(session) == 2, 300, "two running replicas")
    assert api.completions.create(model="tiny", prompt="hello", max_tokens=2).choices


def engine_cores(session: ServeSession) -> list[psutil.Process]:
    found = [process for process in session.processes() if _named(process, "VLLM::EngineCor")]
    return sorted(found, key=lambda process: process.pid)


def _named(process: psutil.Process, name: str) -> bool:
    try:
        return process.name().startswith(name) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def running(session: ServeSession) -> int:
    found = httpx.get(
        f"{session.dashboard_url}/api/serve/applications/",
        headers={"Authorization": f"Bearer {session.marker}"},
        timeout=60,
    ).json()
    replicas = found["applications"]["chat"]["deployments"]["chat"]["replicas"]
    return sum(replica["state"] == "RUNNING" for replica in replicas)


def until(condition: Callable[[], Any], timeout_s: float, what: str) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"{what}: not in {timeout_s} s"
        time.sleep(0.3)
