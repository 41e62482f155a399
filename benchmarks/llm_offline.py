"""Texts for prompts by the batch job, against plain ``vllm.LLM.generate`` on the same prompts.

Both have one engine with the same arguments on a model made here (a Llama with random weights), and
every prompt gets exactly MAX_TOKENS tokens. The engines' start and end are left out: ours counts
from the first batch that reaches the engine to the last commit, with Parquet written; the peer's is
the call of ``generate`` alone.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from benchmarks.report import Row
from twinpath.nodes.llm import LLM

ROOT = Path(__file__).resolve().parent.parent
PROMPTS, MAX_TOKENS = 768, 64
ENGINE = {
    "max_model_len": 256, "max_num_seqs": 128, "enforce_eager": True, "dtype": "bfloat16",
    "seed": 0, "enable_prefix_caching": False, "disable_log_stats": True,
}  # fmt: skip
#: Where OMP_NUM_THREADS is not set vLLM sets 1, and Ray an actor's number of CPUs.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
}  # fmt: skip
SAMPLING = {"temperature": 0.0, "max_tokens": MAX_TOKENS, "ignore_eos": True}
PEER = "vllm.LLM.generate"


class TimedLLM(LLM):
    """Notes when the first batch reached the engine: seconds since the epoch, as files have."""

    async def predict(self, columns: Any) -> Any:
        """As the engine's."""
        _note(Path(self.environment["TWINPATH_FIRST_BATCH"]))
        return await super().predict(columns)


def _note(first: Path) -> None:
    if not first.exists():
        first.write_text(str(time.time()))


def run(rounds: int, console: Console) -> list[Row]:
    """Median figures of alternated rounds."""
    seen: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _in_process("model", folder)
        for number in range(rounds):
            for way in ("peer", "ours") if number % 2 == 0 else ("ours", "peer"):
                with console.status(f"round {number + 1} of {rounds}: {way}"):
                    seen[way].append(_in_process(way, folder))
    counts = {way: {result["tokens"] for result in results} for way, results in seen.items()}
    if counts["ours"] != counts["peer"]:
        raise SystemExit(f"the two ways wrote different numbers of tokens: {counts}")
    for way, results in seen.items():
        console.print(way, [round(r["tokens"] / r["wall_s"]) for r in results])
    rate = {w: median(r["tokens"] / r["wall_s"] for r in results) for w, results in seen.items()}
    metric = f"{PROMPTS} prompts, {MAX_TOKENS} tokens each"
    return [Row(metric, "tokens/s", rate["ours"], rate["peer"], PEER, ">= 0.95")]


def _in_process(way: str, folder: Path) -> dict[str, Any]:
    path = os.pathsep.join([str(ROOT / "platform"), str(ROOT), str(ROOT / "tests")])
    more = {"PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}
    log = folder / f"{way}.log"
    with log.open("wb") as sink:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.llm_offline", way, str(folder)],
            env=os.environ | more | ENVIRONMENT, cwd=ROOT, stdout=sink, stderr=subprocess.STDOUT,
            timeout=300,
        )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{way} failed:\n{log.read_text()[-3000:]}")
    found: dict[str, Any] = json.loads(log.read_text().split("RESULT ")[1].splitlines()[0])
    return found


def _model(folder: Path) -> dict[str, Any]:
    import pandas as pd
    from llm import models

    models.make_llama(folder / "model")
    pd.DataFrame({"prompt": models.prompts(PROMPTS)}).to_parquet(folder / "prompts.parquet")
    return {}


def _peer(folder: Path) -> dict[str, Any]:
    import pandas as pd
    from vllm import LLM as Plain
    from vllm import SamplingParams

    prompts = pd.read_parquet(folder / "prompts.parquet")["prompt"].tolist()
    engine = Plain(str(folder / "model"), **ENGINE)
    started = time.monotonic()
    outputs = engine.generate(prompts, SamplingParams(**SAMPLING), use_tqdm=False)
    wall_s = time.monotonic() - started
    return {"wall_s": wall_s, "tokens": sum(len(o.outputs[0].token_ids) for o in outputs)}


def _ours(folder: Path) -> dict[str, Any]:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
    import ray

    from graphs.generate import Prompt, Written
    from twinpath import Batch, Graph, Replicas

    with tempfile.TemporaryDirectory(dir=folder) as name:
        sink, first = Path(name) / "texts", Path(name) / "first"
        llm = TimedLLM(
            str(folder / "model"), sampling=SAMPLING, engine=ENGINE,
            environment=ENVIRONMENT | {"TWINPATH_FIRST_BATCH": str(first)},
        )  # fmt: skip
        graph = Graph("generate", input=Prompt, output=Written)
        with graph as rows:
            placed = llm.on(num_cpus=2, replicas=Replicas(1, 1), batch=Batch(max_size=64))
            graph.output(placed(rows))
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
        try:
            graph.job(folder / "prompts.parquet", sink, resume=True, in_flight=8).run()
            job_ended = time.time()
        finally:
            ray.shutdown()
        tokens = pc.sum(pq.read_table(sink)["completion_tokens"]).as_py()
        began, ended = float(first.read_text()), max(f.stat().st_mtime for f in commits(sink))
        return {"wall_s": ended - began, "tokens": tokens, "job_end_s": job_ended - ended}


def commits(sink: Path) -> list[Path]:
    """Files of committed batches."""
    return list(sink.glob("run-*/*.parquet"))


if __name__ == "__main__":
    step = {"model": _model, "peer": _peer, "ours": _ours}[sys.argv[1]]
    print("RESULT", json.dumps(step(Path(sys.argv[2]))), flush=True)
