"""An engine as a node on Serve against ``vllm serve``: the same tiny model, in turns.

Each round loads the one and then the other with the same streams, while the other one is stopped.
What is compared is what the serving around the engine costs: the model is tiny, so a step of the
engine takes a millisecond or two and everything else shows.
"""

import asyncio
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import yaml
from rich.console import Console

from benchmarks.llm_model import make_model, prompts
from benchmarks.online import environments
from benchmarks.online.processes import Served, running
from benchmarks.online.served import ROOT
from benchmarks.report import Row
from twinpath.online.session import ServeSession, free_ports

STREAMS = (1, 8, 32)
#: Streams that are run, one after the other, by each client of a turn.
REQUESTS = {1: 12, 8: 10, 32: 5}
#: Lengths of answers, tokens. Streams of one length would all end and begin together, and the time
#: to the first token would say how many others were ahead by chance.
LENGTHS = range(32, 97)
ENGINE = {
    "max_model_len": 256, "max_num_seqs": 64, "enforce_eager": True, "dtype": "bfloat16",
    "served_model_name": "tiny",
}  # fmt: skip
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING",
}  # fmt: skip
#: Serve's controller looks around ten times a second, for 4 ms each time: on two cores that the
#: engine and its server fill, tokens wait meanwhile.
FEW_CORES = {"RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "1"}


@dataclass(frozen=True)
class Turn:
    """What one turn of a server gave."""

    per_s: float
    first_p50_ms: float
    between_p99_ms: float


def run(rounds: int, console: Console) -> list[Row]:
    """Median figures of alternated rounds. Raises SystemExit when a stream is not whole."""
    folder = environments.folder() / "models" / "llm"
    make_model(folder)
    seen: dict[str, dict[int, list[Turn]]] = {
        way: {streams: [] for streams in STREAMS} for way in ("twinpath", "vllm serve")
    }
    with (
        tempfile.TemporaryDirectory(prefix="llm-serving-") as log,
        contextlib.ExitStack() as servers,
    ):
        ways = {}
        for way, start in (
            ("vllm serve", lambda: _vllm_serve(folder, Path(log))),
            ("twinpath", lambda: _twinpath(folder)),
        ):
            server = servers.enter_context(start())
            # It has to be able to end, whatever happens in between.
            servers.callback(server.resume)
            asyncio.run(_turn(server.url, 8, 2))
            server.pause()
            ways[way] = server
        for number in range(rounds):
            for way in seen if number % 2 == 0 else reversed(seen):
                ways[way].resume()
                asyncio.run(_turn(ways[way].url, 1, 1))
                for streams in STREAMS:
                    with console.status(f"round {number + 1} of {rounds}: {way}, {streams}"):
                        turn = asyncio.run(_turn(ways[way].url, streams, REQUESTS[streams]))
                    seen[way][streams].append(turn)
                ways[way].pause()
    rows = []
    for streams in STREAMS:
        at = f"{streams} stream{'s' if streams > 1 else ''}"
        for figure, unit, target in (
            ("per_s", "tokens/s", ">= 0.97"),
            ("first_p50_ms", "ms to the first token (p50)", "<= 1.1"),
            ("between_p99_ms", "ms between tokens (p99)", "<= 1.1"),
        ):
            mine, peer = (median(getattr(t, figure) for t in seen[way][streams]) for way in seen)
            rows.append(Row(at, unit, mine, peer, "vllm serve", target))
    return rows


async def _turn(url: str, streams: int, requests: int) -> Turn:
    host, port = url.removeprefix("http://").split(":")
    texts = prompts(streams * requests)
    first: list[float] = []
    between: list[float] = []
    tokens = 0

    async def client(number: int) -> None:
        nonlocal tokens
        for position in range(requests):
            index = number * requests + position
            length = LENGTHS[index * 29 % len(LENGTHS)]
            arrivals = await _stream(host, int(port), texts[index], length)
            first.append(arrivals[1] - arrivals[0])
            between.extend(np.diff(arrivals[1:]))
            tokens += length

    began_s = time.perf_counter()
    await asyncio.gather(*(client(number) for number in range(streams)))
    took_s = time.perf_counter() - began_s
    return Turn(
        tokens / took_s,
        float(np.median(first)) * 1000,
        float(np.percentile(between, 99)) * 1000,
    )


async def _stream(host: str, port: int, prompt: str, length: int) -> list[float]:
    """When the request was sent and when each event with text came, in seconds. A plain socket: an
    HTTP library would cost more than what is measured."""
    body = json.dumps(
        {
            "model": "tiny", "prompt": prompt, "max_tokens": length, "temperature": 0,
            "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
        }
    ).encode()  # fmt: skip
    reader, writer = await asyncio.open_connection(host, port)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    arrivals = [time.perf_counter()]
    writer.write(head.encode() + body)
    written = 0
    async for line in reader:
        if line.startswith(b'data: {"id"'):
            now_s = time.perf_counter()
            event = json.loads(line[6:])
            if event["choices"]:
                arrivals.append(now_s)
            elif event.get("usage"):
                written = event["usage"]["completion_tokens"]
    writer.close()
    if written != length:
        raise SystemExit(f"a stream had {written} tokens, not {length}")
    return arrivals


@contextlib.contextmanager
def _twinpath(model: Path) -> Iterator[Served]:
    variables = {"TWINPATH_BENCH_LLM": str(model), **ENVIRONMENT, **FEW_CORES}
    with ServeSession(num_cpus=8, pythonpath=[ROOT / "platform", ROOT], env=variables) as session:
        application = {"name": "llm", "import_path": "benchmarks.llm_model:app"}
        config = session.folder / "app.yaml"
        config.write_text(yaml.safe_dump({"applications": [application]}))
        session.deploy(config, timeout_s=300)
        session.wait_until_ready()
        yield Served(session.url, session.processes)


@contextlib.contextmanager
def _vllm_serve(model: Path, folder: Path) -> Iterator[Served]:
    [port] = free_ports(1)
    # What the command runs; the command itself fails where the distribution is named vllm-cpu.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--disable-uvicorn-access-log"]
    for name, value in ENGINE.items():
        flag = f"--{name.replace('_', '-')}"
        command += [flag] if value is True else [flag, str(value)]
    url = f"http://127.0.0.1:{port}"
    with running(command, f"{url}/health", folder, os.environ | ENVIRONMENT) as processes:
        yield Served(url, processes)
