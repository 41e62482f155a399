"""``twinpath plan-memory``: does a model, or every engine of a graph, fit on the card?"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from twinpath.errors import ConfigError, MemoryPlanError


def plan_memory(
    target: Annotated[
        str, typer.Argument(metavar="MODEL|MODULE:GRAPH", help="A model's folder, or a graph.")
    ],
    memory_gib: Annotated[
        float | None,
        typer.Option(help="Memory of the card, in GiB; default: the smallest GPU here, by NVML, "
                     "else this machine's memory."),
    ] = None,
    versions: Annotated[int, typer.Option(help="Versions loaded at a time on a card.")] = 1,
    sequences: Annotated[int, typer.Option(help="Sequences of full length at a time.")] = 1,
    headroom: Annotated[
        float, typer.Option(help="Part of the memory left free, at least 0.1.")
    ] = 0.125,
    max_model_len: Annotated[int | None, typer.Option(help="Tokens of a sequence.")] = None,
    tensor_parallel: Annotated[int | None, typer.Option(help="Cards for one engine.")] = None,
    dtype: Annotated[str, typer.Option(help="As vLLM's --dtype.")] = "auto",
    kv_cache_dtype: Annotated[str, typer.Option(help="As vLLM's --kv-cache-dtype.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:  # fmt: skip
    """Weights, KV cache and versions against the card. Exit status 1 when they do not fit."""
    from twinpath.nodes import llm_memory

    total = int(memory_gib * llm_memory.GIB) if memory_gib is not None else None
    options: dict[str, Any] = {"dtype": dtype, "kv_cache_dtype": kv_cache_dtype}
    options |= {"max_model_len": max_model_len} if max_model_len else {}
    options |= {"tensor_parallel_size": tensor_parallel} if tensor_parallel else {}
    shared: dict[str, Any] = {
        "versions": versions, "sequences": sequences, "headroom": headroom,
    }  # fmt: skip
    if Path(target).is_dir():
        known = total or llm_memory.card_bytes() or llm_memory.host_bytes()
        plans = {
            Path(target).resolve().name: llm_memory.plan_memory(
                target, known, engine=options, **shared
            )
        }
    else:
        plans = _of_graph(target, total, shared)
    if as_json:
        typer.echo(json.dumps({name: plan.as_dict() for name, plan in plans.items()}, indent=2))
    else:
        Console().print(_table(plans))
    refused = False
    for plan in plans.values():
        try:
            plan.check()
        except MemoryPlanError as error:
            refused = True
            Console(stderr=True, soft_wrap=True, highlight=False).print(str(error), markup=False)
    if refused:
        raise typer.Exit(1)


def _of_graph(path: str, total: int | None, shared: dict[str, Any]) -> dict[str, Any]:
    from twinpath.cli.loading import load_graph
    from twinpath.nodes.llm_memory import is_engine, plan_node

    steps = [step for step in load_graph(path).plan.steps if is_engine(step.node)]
    if not steps:
        raise ConfigError(f"{path} has no engine among its nodes: nothing to plan")
    plans = {}
    for step in steps:
        gpus = step.placement.num_gpus if step.placement else 0.0
        plan = plan_node(step.node, total, num_gpus=gpus, **shared)
        if plan is None:
            raise ConfigError(
                f"node {step.name!r}: model {step.node.model!r} is no local folder, or runs on a "
                "GPU and there is none here: give --memory-gib and download the model first"
            )
        plans[step.name] = plan
    return plans


def _table(plans: dict[str, Any]) -> Table:
    from twinpath.nodes.llm_memory import GIB

    table = Table(box=None, header_style="bold")
    for heading in ("GiB on each card", *plans):
        table.add_column(heading, no_wrap=True)

    def row(name: str, read: Any, form: str = "{:.3f}") -> None:
        table.add_row(name, *(form.format(read(plan)) for plan in plans.values()))

    row("memory", lambda p: p.total_bytes / GIB)
    row("usable", lambda p: p.usable_bytes / GIB)
    row("weights", lambda p: p.weights_bytes / GIB)
    row("working memory (estimate)", lambda p: p.working_bytes / GIB)
    row("KV cache", lambda p: p.kv_bytes / GIB)
    row("versions", lambda p: p.versions, "× {}")
    row("needed", lambda p: p.needed_bytes / GIB)
    row("KV bytes a token", lambda p: p.kv_bytes_per_token, "{:,}")
    row("tokens that the rest would hold", lambda p: p.spare_tokens, "{:,}")
    row("gpu_memory_utilization", lambda p: p.utilization, "{:.2f}")
    row("fits", lambda p: "yes" if p.fits else "no", "{}")
    return table
