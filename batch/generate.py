"""Texts for a Parquet file's column `prompt`; killed and run again, it goes on where it was.

`ray job submit --working-dir . -- python batch/generate.py --model … --source … --out …`
"""

import argparse
import json
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

from graphs.generate import generation


def tokens(sink: Path) -> dict[str, int]:
    """Tokens read and written, over all attempts."""
    counts = pq.read_table(sink, columns=["prompt_tokens", "completion_tokens"])
    return {name: pc.sum(counts[name]).as_py() or 0 for name in counts.column_names}


def main() -> None:
    """Generate; print rows, tokens and dead letters."""
    parser = argparse.ArgumentParser(description="Generate texts for prompts.")
    parser.add_argument("--model", required=True, help="a folder, or a name in the model hub")
    parser.add_argument("--source", required=True, help="Parquet with a column `prompt`")
    parser.add_argument("--out", type=Path, required=True, help="folder for the texts")
    parser.add_argument("--keep", nargs="*", default=[], help="columns to copy, such as an id")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--engine", type=json.loads, default={}, help="engine arguments, as JSON")
    parser.add_argument("--environment", type=json.loads, default={}, help="of the engine, as JSON")
    parser.add_argument("--engines", type=int, default=1, help="engines side by side")
    parser.add_argument("--num-cpus", type=float, default=1, help="CPUs of each engine")
    parser.add_argument("--num-gpus", type=float, default=0, help="GPUs of each engine")
    parser.add_argument("--batch-size", type=int, default=64, help="prompts committed at a time")
    parser.add_argument("--in-flight", type=int, default=8, help="batches in an engine at a time")
    given = parser.parse_args()
    graph = generation(
        given.model, engine={"disable_log_stats": True} | given.engine, engines=given.engines,
        environment=given.environment,
        sampling={"max_tokens": given.max_tokens, "temperature": given.temperature},
        num_cpus=given.num_cpus, num_gpus=given.num_gpus, batch_size=given.batch_size,
    )  # fmt: skip
    job = graph.job(
        given.source, given.out, keep=given.keep, resume=True, in_flight=given.in_flight
    )
    done = job.run()
    spent = tokens(given.out) if done.rows else {"prompt_tokens": 0, "completion_tokens": 0}
    print(
        f"{done.rows} texts ({done.resumed_rows} rows done before), {done.dead_letters} dead "
        f"letters, {spent['prompt_tokens']} tokens read, {spent['completion_tokens']} written, "
        f"{done.duration_s:.1f} s"
    )


if __name__ == "__main__":
    main()
