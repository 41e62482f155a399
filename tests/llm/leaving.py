"""Clients that leave before their answer is there, and what the engines of ``chat`` wrote for them
all the same, as Prometheus would read it."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import httpx
import psutil

from llm.processes import engines_of, rest_within, worked_s
from twinpath.online.session import ServeSession

#: Of a session that is asked for these counts: Ray's exporter has them two seconds later.
OFTEN = {"RAY_metrics_report_interval_ms": "2000"}
CLIENTS, CHOICES, LENGTH = 60, 8, 440
#: Asks, given a session and its engines, and hangs up: the tokens for clients who would stay.
HangUp = Callable[[ServeSession, Sequence[psutil.Process]], Awaitable[int]]


def long_answer(number: int, **more: Any) -> dict[str, Any]:
    """A request whose answer takes an engine a while."""
    return {
        "model": "tiny", "prompt": f"{number} hello", "max_tokens": LENGTH, "n": CHOICES,
        "ignore_eos": True, "temperature": 1,
    } | more  # fmt: skip


def vllm_counts(session: ServeSession, name: str) -> dict[str, float]:
    """A metric of the chat's engines, by replica."""
    found = session.folder / "prom_metrics_service_discovery.json"
    [target, *_] = json.loads(found.read_text())[0]["targets"]
    lines = httpx.get(f"http://{target}/metrics", timeout=30).raise_for_status().text.splitlines()
    samples = [line for line in lines if line.startswith(f"ray_vllm_{name}{{")]
    return {
        line.partition('replica="')[2].partition('"')[0]: float(line.rpartition(" ")[2])
        for line in samples
        if 'application="chat"' in line
    }


def tokens_written(session: ServeSession) -> float:
    """By both engines, once that grows no more; their counts go out every two seconds."""
    found, since_s = vllm_counts(session, "generation_tokens_total"), time.monotonic()
    while len(found) < 2 or time.monotonic() - since_s < 5:
        time.sleep(0.5)
        now = vllm_counts(session, "generation_tokens_total")
        if now != found:
            found, since_s = now, time.monotonic()
    return sum(found.values())


def nothing_is_left(session: ServeSession) -> bool:
    """Whether the engines have neither sequences nor blocks of them."""
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    return all(set(vllm_counts(session, name).values()) == {0} for name in names)


def leaves_nothing(session: ServeSession, hang_up: HangUp) -> None:
    """Who hangs up leaves both engines of ``chat`` nothing to write, a second later."""
    first, second = engines_of(session, "chat")
    before = tokens_written(session)
    whole = asyncio.run(hang_up(session, (first, second)))
    assert rest_within((first, second), 1)
    assert 0 < tokens_written(session) - before < whole / 2
    assert nothing_is_left(session)


async def hang_up_on_streams(session: ServeSession, engines: Sequence[psutil.Process]) -> int:
    """Ask for a hundred streams, which two engines need some ten seconds for, and hang up on each
    at its first event."""
    clients, choices = 100, 2

    async def hang_up(client: httpx.AsyncClient, number: int) -> None:
        body = long_answer(number, n=choices, stream=True)
        async with client.stream("POST", "/v1/completions", json=body, timeout=120) as answer:
            assert answer.status_code == 200
            await anext(answer.aiter_lines())

    async with httpx.AsyncClient(base_url=f"{session.url}/chat") as client:
        await asyncio.gather(*(hang_up(client, number) for number in range(clients)))
    return clients * choices * LENGTH


async def hang_up_on_whole_answers(session: ServeSession, engines: Sequence[psutil.Process]) -> int:
    """Ask for answers that come in one piece, which take some twenty seconds, and hang up while
    they are made."""
    before_s = worked_s(engines)
    writers = await asyncio.gather(*(_asked(session, number) for number in range(CLIENTS)))
    deadline_s = time.monotonic() + 60
    while worked_s(engines) < before_s + 1:
        assert time.monotonic() < deadline_s, "no engine writes anything"
        await asyncio.sleep(0.1)
    for writer in writers:
        writer.close()
    return CLIENTS * CHOICES * LENGTH


async def _asked(session: ServeSession, number: int) -> asyncio.StreamWriter:
    """The body comes after the headers, in another packet, as most HTTP clients send it."""
    _, writer = await asyncio.open_connection("127.0.0.1", session.http_port)
    body = json.dumps(long_answer(number)).encode()
    head = (
        "POST /chat/v1/completions HTTP/1.1\r\nhost: tests\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    for part in (head.encode(), body):
        writer.write(part)
        await writer.drain()
        await asyncio.sleep(0.1)
    return writer
