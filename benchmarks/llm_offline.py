"""Texts for prompts by the batch job, against plain ``vllm.LLM.generate`` on the same prompts.

Both have one engine with the same arguments on a model made here (a Llama with random weights);
where these say nothing, vLLM's defaults: for ours those of a server, for the peer those of its
class ``LLM``, which takes twice as many tokens a step on a CPU. Every prompt gets exactly
MAX_TOKENS tokens. The engines' start and end are left out: ours counts from the first batch that
reaches the engine to the last commit, with Parquet written; the peer's is the call of
``generate`` alone.
"""

import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from benchmarks.apart import apart, tell, turns
from benchmarks.llm_model import engine, on_gpu, sizes
from benchmarks.report import Row
from twinpath.nodes.llm import LLM

MODULE = "benchmarks.llm_offline"
PROMPTS, MAX_TOKENS = 3_072, 64
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
        apart(MODULE, "model", folder, ENVIRONMENT)
        for way in turns(("peer", "ours"), rounds, console):
            seen[way].append(apart(MODULE, way, folder, ENVIRONMENT))
    counts = {way: {result["tokens"] for result in results} for way, results in seen.items()}
    if counts["ours"] != counts["peer"]:
        raise SystemExit(f"the two ways wrote different numbers of tokens: {counts}")
    for way, results in seen.items():
        console.print(way, [round(r["tokens"] / r["wall_s"]) for r in results])
    rate = {w: median(r["tokens"] / r["wall_s"] for r in results) for w, results in seen.items()}
    metric = f"{PROMPTS} prompts, {MAX_TOKENS} tokens each"
    return [Row(metric, "tokens/s", rate["ours"], rate["peer"], PEER, ">= 0.95")]


def _model(folder: Path) -> dict[str, Any]:
    import pandas as pd
    from llm import models

    models.make_llama(folder / "model", **sizes())
    pd.DataFrame({"prompt": models.prompts(PROMPTS)}).to_parquet(folder / "prompts.parquet")
    return {}


def _peer(folder: Path) -> dict[str, Any]:
    import pandas as pd
    from vllm import LLM as Plain
    from vllm import SamplingParams

    prompts = pd.read_parquet(folder / "prompts.parquet")["prompt"].tolist()
    plain = Plain(str(folder / "model"), **engine(ENGINE))
    started = time.monotonic()
    outputs = plain.generate(prompts, SamplingParams(**SAMPLING), use_tqdm=False)
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
            str(folder / "model"), sampling=SAMPLING, engine=engine(ENGINE),
            environment=ENVIRONMENT | {"TWINPATH_FIRST_BATCH": str(first)},
        )  # fmt: skip
        graph = Graph("generate", input=Prompt, output=Written)
        with graph as rows:
            placed = llm.on(
                num_cpus=2, num_gpus=int(on_gpu()), replicas=Replicas(1, 1),
                batch=Batch(max_size=64),
            )  # fmt: skip
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
    tell(step(Path(sys.argv[2])))
