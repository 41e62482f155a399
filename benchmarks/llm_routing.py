"""Prompts to two engine replicas by their beginnings, against taking turns.

TOPICS long beginnings (as system prompts are) with short ends, in random order, from CLIENTS
clients that each wait for their answer. One token is written, so the time of an answer is the time
to the first token. A replica's KV cache holds somewhat more than half of the beginnings. The model,
a Llama with random weights, is made here; its work is a real engine's. The same two engines'
arguments, the same requests in the same order; hit rates are those of the engines' own schedulers,
in tokens.
"""

import json
import os
import random
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from rich.console import Console

from benchmarks.apart import apart, tell, turns
from benchmarks.report import Row
from twinpath.nodes.llm import LLM

MODULE = "benchmarks.llm_routing"
TOPICS, WORDS, REQUESTS, CLIENTS = 24, 640, 288, 4
ENGINE = {
    "max_model_len": 1024, "max_num_seqs": 16, "enforce_eager": True, "dtype": "bfloat16",
    "seed": 0, "enable_prefix_caching": True, "block_size": 32,
    # 24 beginnings of about 20 blocks are 480; four prompts under way take 84.
    "num_gpu_blocks_override": 384,
}  # fmt: skip
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
SAMPLING = {"temperature": 0.0, "max_tokens": 1}
PEER = "taking turns"


class ByPrefix(LLM):
    """Notes its engine's count of prefix tokens, in a file for each process."""

    async def predict(self, columns: Any) -> Any:
        """As the engine's."""
        answer = await super().predict(columns)
        _note(Path(self.environment["TWINPATH_COUNTS"]), self.load)
        return answer


class InTurn(ByPrefix):
    """The same, with replicas that take turns."""

    router = "benchmarks.take_turns:TakeTurns"


def _note(folder: Path, load: Any) -> None:
    counts = {"queries": load.prefix_queries, "hits": load.prefix_hits}
    (folder / f"{os.getpid()}.json").write_text(json.dumps(counts))


def run(rounds: int, console: Console) -> list[Row]:
    """Median figures of alternated rounds."""
    seen: dict[str, list[dict[str, Any]]] = {"prefix": [], "turns": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        apart(MODULE, "model", folder)
        for way in turns(("turns", "prefix"), rounds, console):
            seen[way].append(apart(MODULE, way, folder))
            console.print(way, seen[way][-1])

    def row(metric: str, unit: str, key: str, target: str | None) -> Row:
        ours, peer = (median(r[key] for r in seen[way]) for way in ("prefix", "turns"))
        return Row(metric, unit, ours, max(peer, 1e-9), PEER, target)

    return [
        row("prefix tokens found in the cache", "share", "hit_rate", "> 1"),
        row("time to first token, median", "ms", "p50_ms", "< 1"),
        row("time to first token, p95", "ms", "p95_ms", None),
        row("requests", "1/s", "requests_per_s", "> 1"),
    ]


def _model(folder: Path) -> dict[str, Any]:
    from llm import models

    models.make_llama(
        folder / "model", hidden_size=512, intermediate_size=1408, num_hidden_layers=6,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=1024,
    )  # fmt: skip
    source = random.Random(1)
    topics = [" ".join(source.choices(models.WORDS, k=WORDS)) for _ in range(TOPICS)]
    prompts = [
        f"{source.choice(topics)} {number} {' '.join(source.choices(models.WORDS, k=6))}"
        for number in range(REQUESTS)
    ]
    (folder / "prompts.json").write_text(json.dumps(prompts))
    return {}


def _serve(folder: Path, node: type[ByPrefix]) -> dict[str, Any]:
    import httpx
    import ray
    from ray import serve

    from graphs.generate import Prompt, Written
    from twinpath import Batch, Graph, Replicas
    from twinpath.online.session import free_ports

    prompts = json.loads((folder / "prompts.json").read_text())
    counts = Path(tempfile.mkdtemp(dir=folder))
    llm = node(
        str(folder / "model"), sampling=SAMPLING, engine=ENGINE,
        environment=ENVIRONMENT | {"TWINPATH_COUNTS": str(counts), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    graph = Graph("generate", input=Prompt, output=Written)
    with graph as rows:
        placed = llm.on(num_cpus=1, replicas=Replicas(2, 2), batch=Batch(max_size=16))
        graph.output(placed(rows))
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        port = free_ports(1)[0]
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(graph.app({}), name="generate", route_prefix="/")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:

            def ask(prompt: str) -> float:
                started = time.perf_counter()
                client.post("/predict", json={"rows": [{"prompt": prompt}]}).raise_for_status()
                return 1000 * (time.perf_counter() - started)

            with ThreadPoolExecutor(CLIENTS) as pool:
                list(pool.map(ask, ["hello there"] * 8))
                started = time.perf_counter()
                times = list(pool.map(ask, prompts))
                wall_s = time.perf_counter() - started
    finally:
        serve.shutdown()
        ray.shutdown()
    noted = [json.loads(file.read_text()) for file in counts.glob("*.json")]
    if len(noted) != 2:
        raise SystemExit(f"expected two replicas at work, got {len(noted)}")
    return {
        "hit_rate": sum(n["hits"] for n in noted) / sum(n["queries"] for n in noted),
        "p50_ms": median(times), "p95_ms": quantiles(times, n=20)[-1],
        "requests_per_s": len(times) / wall_s,
    }  # fmt: skip


if __name__ == "__main__":
    way, folder = sys.argv[1], Path(sys.argv[2])
    found = _model(folder) if way == "model" else None
    if found is None:
        # By the module's name, so that replicas find the class.
        from benchmarks import llm_routing

        found = _serve(folder, {"prefix": llm_routing.ByPrefix, "turns": llm_routing.InTurn}[way])
    tell(found)
