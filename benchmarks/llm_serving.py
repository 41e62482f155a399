"""An engine as a node on Serve against ``vllm serve``: the same model, in turns.

Each round loads one after the other with the same streams, while the others are stopped; all are
started STARTS times, with ``rounds`` of each.
On CPUs the model is tiny, so a step of the engine takes a millisecond or two and everything else
shows. Part of that is how the engine runs: vLLM starts two processes for it on a CPU, which both
poll, and the node one, where nothing is bound to cores. So there is a second peer, ``vllm serve``
that is told to do the same: beside it stands what the serving around the engine costs.
"""

import asyncio
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import yaml
from rich.console import Console

from benchmarks.llm_model import engine, make_model, on_gpu, prompts
from benchmarks.online import environments
from benchmarks.online.processes import Served, running
from benchmarks.online.served import ROOT
from benchmarks.report import Row
from twinpath.nodes.llm_engine import ONE_PROCESS
from twinpath.online.session import ServeSession, free_ports

STREAMS = (1, 8, 32)
#: Streams that are run, one after the other, by each client of a turn.
REQUESTS = {1: 30, 8: 10, 32: 10}
#: How often both servers are started: two processes of the same code differ from each other.
STARTS = 3
#: Clients that wait for one answer before they ask again load the faster server more. For times at
#: equal load requests also come at this part of the rate that ``vllm serve`` answered at.
PACE = 0.9
#: How long a server that stood still may refuse requests, seconds.
WAKE_S = 20.0
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
    #: Time of a client for one request.
    request_s: float
    first_p50_ms: float
    between_p99_ms: float


FIGURES = (
    ("per_s", "tokens/s", ">= 0.97"),
    ("first_p50_ms", "ms to the first token (p50)", "<= 1.1"),
    ("between_p99_ms", "ms between tokens (p99)", "<= 1.1"),
)
OURS, PEER, ALONE = "twinpath", "vllm serve", "vllm serve, engine in one process"
#: Turns by way, streams, and whether they were paced.
Seen = dict[tuple[str, int, bool], list[Turn]]


def run(rounds: int, console: Console) -> list[Row]:
    """Median figures of alternated rounds of all starts. Raises SystemExit for a broken stream."""
    folder = make_model(environments.folder() / "models")
    # On a GPU the engine is one process by itself.
    peers = (PEER,) if on_gpu() else (PEER, ALONE)
    seen: Seen = {(w, s, p): [] for w in (OURS, *peers) for s in STREAMS for p in (False, True)}
    for start in range(STARTS):
        with _all(folder, peers) as ways:
            for number in range(rounds):
                with console.status(
                    f"start {start + 1} of {STARTS}, round {number + 1} of {rounds}"
                ):
                    order = [OURS, *peers]
                    turn = (start + number) % len(order)
                    _round(ways, order[turn:] + order[:turn], seen)
    return [row for peer in peers for row in _rows(seen, peer)]


def _rows(seen: Seen, peer: str) -> Iterator[Row]:
    """Medians of all turns beside a peer's."""
    for streams in STREAMS:
        at = f"{streams} stream{'s' if streams > 1 else ''}"
        for name, paced, figures in ((at, False, FIGURES), (f"{at}, paced", True, FIGURES[1:])):
            for figure, unit, target in figures:
                ours, theirs = (
                    median(getattr(t, figure) for t in seen[way, streams, paced])
                    for way in (OURS, peer)
                )
                yield Row(name, unit, ours, theirs, peer, target)


def _round(ways: Mapping[str, Served], order: Sequence[str], seen: Seen) -> None:
    """Each as fast as it can, then all at the rate that ``vllm serve`` had, less a little."""
    for paced in (False, True):
        for way in order:
            _wake(ways[way])
            for streams in STREAMS:
                own_s = seen[PEER, streams, False][-1].request_s if paced else 0.0
                turn = asyncio.run(_turn(ways[way].url, streams, REQUESTS[streams], own_s / PACE))
                seen[way, streams, paced].append(turn)
            ways[way].pause()


def _wake(server: Served) -> None:
    """Go on; to who stood still, what it talks with may have been silent for too long at first."""
    server.resume()
    deadline_s = time.monotonic() + WAKE_S
    while True:
        try:
            asyncio.run(_turn(server.url, 1, 1))
        except SystemExit as error:
            print(error, flush=True)
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.5)
        else:
            return


@contextlib.contextmanager
def _all(model: Path, peers: Sequence[str]) -> Iterator[dict[str, Served]]:
    """Our server and its peers, warm and paused."""
    with (
        tempfile.TemporaryDirectory(prefix="llm-serving-") as log,
        contextlib.ExitStack() as servers,
    ):
        ways = {}
        for way in (*peers, OURS):
            folder = Path(log, str(len(ways)))
            folder.mkdir()
            server = servers.enter_context(
                _twinpath(model) if way == OURS else _vllm_serve(model, folder, way == ALONE)
            )
            # It has to be able to end, whatever happens in between.
            servers.callback(server.resume)
            asyncio.run(_turn(server.url, 8, 2))
            server.pause()
            ways[way] = server
        yield ways


async def _turn(url: str, streams: int, requests: int, period_s: float = 0.0) -> Turn:
    """Clients that each send one request after the other; or, with a period, requests that come at
    that rate whether or not those before are answered."""
    host, port = url.removeprefix("http://").split(":")
    texts = prompts(streams * requests)
    first: list[float] = []
    between: list[float] = []
    tokens = 0

    async def request(index: int) -> None:
        nonlocal tokens
        length = LENGTHS[index * 29 % len(LENGTHS)]
        arrivals = await _stream(host, int(port), texts[index], length)
        first.append(arrivals[1] - arrivals[0])
        between.extend(np.diff(arrivals[1:]))
        tokens += length

    async def client(number: int) -> None:
        for position in range(requests):
            await request(number * requests + position)

    async def arrival(index: int) -> None:
        await asyncio.sleep(began_s + period_s / streams * index - time.perf_counter())
        await request(index)

    began_s = time.perf_counter()
    if period_s:
        await asyncio.gather(*(arrival(index) for index in range(streams * requests)))
    else:
        await asyncio.gather(*(client(number) for number in range(streams)))
    took_s = time.perf_counter() - began_s
    return Turn(
        tokens / took_s,
        took_s / requests,
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
    written, status = 0, await reader.readline()
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
        raise SystemExit(
            f"a stream had {written} tokens, not {length}: {host}:{port} said {status!r}"
        )
    return arrivals


@contextlib.contextmanager
def _twinpath(model: Path) -> Iterator[Served]:
    variables = {"TWINPATH_BENCH_LLM": str(model), **ENVIRONMENT, **FEW_CORES}
    with ServeSession(num_cpus=8, pythonpath=[ROOT / "platform", ROOT], env=variables) as session:
        application: dict[str, Any] = {"name": "llm", "import_path": "benchmarks.llm_model:app"}
        if on_gpu():
            application["args"] = {"ingress": {"num_gpus": 1}}
        config = session.folder / "app.yaml"
        config.write_text(yaml.safe_dump({"applications": [application]}))
        session.deploy(config, timeout_s=300)
        session.wait_until_ready()
        yield Served(session.url, session.processes)


@contextlib.contextmanager
def _vllm_serve(model: Path, folder: Path, alone: bool) -> Iterator[Served]:
    [port] = free_ports(1)
    # What the command runs; the command itself fails where the distribution is named vllm-cpu.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--disable-uvicorn-access-log"]
    if alone:
        command += ["--distributed-executor-backend", ONE_PROCESS]
    for name, value in engine(ENGINE).items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            command += [flag] if value else []
        else:
            command += [flag, str(value)]
    url = f"http://127.0.0.1:{port}"
    with running(command, f"{url}/health", folder, os.environ | ENVIRONMENT) as processes:
        yield Served(url, processes)
