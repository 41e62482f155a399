"""``twinpath plan-memory``: does a model, or every engine of a graph, fit on the card?"""

import json
from pathlib import Path
from types import SimpleNamespace
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
    num_gpus: Annotated[
        float | None,
        typer.Option(min=0, help="GPUs of each engine, as a node's num_gpus; 0 is a CPU. Default: "
                     "as the graph says; a model's folder is for a card."),
    ] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Tokens of a sequence.")] = None,
    tensor_parallel: Annotated[int | None, typer.Option(help="Cards for one engine.")] = None,
    dtype: Annotated[str | None, typer.Option(help="As vLLM's --dtype.")] = None,
    kv_cache_dtype: Annotated[
        str | None, typer.Option(help="As vLLM's --kv-cache-dtype.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:  # fmt: skip
    """Weights, KV cache and versions against the card. Exit status 1 when they do not fit.

    What is given of an engine's arguments replaces those of every engine of a graph.
    """
    from twinpath.nodes import llm_memory

    total = int(memory_gib * llm_memory.GIB) if memory_gib is not None else None
    given = {
        "max_model_len": max_model_len, "tensor_parallel_size": tensor_parallel, "dtype": dtype,
        "kv_cache_dtype": kv_cache_dtype,
    }  # fmt: skip
    shared: dict[str, Any] = {
        "engine": {name: value for name, value in given.items() if value is not None},
        "versions": versions, "sequences": sequences, "headroom": headroom,
    }  # fmt: skip
    if Path(target).is_dir():
        plans = {Path(target).resolve().name: _of_folder(target, total, num_gpus, shared)}
    else:
        plans = _of_graph(target, total, num_gpus, shared)
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
            _stderr().print(str(error), markup=False)
    if refused:
        raise typer.Exit(1)


def _of_folder(
    folder: str, total: int | None, num_gpus: float | None, shared: dict[str, Any]
) -> Any:
    from twinpath.nodes.llm_memory import card_bytes, plan_engine

    if num_gpus is None:
        on_card = total is not None or card_bytes() is not None
        num_gpus = (shared["engine"].get("tensor_parallel_size") or 1) if on_card else 0
    engine = SimpleNamespace(model=folder, engine_options={}, environment={})
    return plan_engine(engine, total, num_gpus=num_gpus, on_gpu=num_gpus > 0, **shared)


def _of_graph(
    path: str, total: int | None, num_gpus: float | None, shared: dict[str, Any]
) -> dict[str, Any]:
    from twinpath.cli.loading import load_graph
    from twinpath.nodes.llm_memory import is_engine, plan_engine

    steps = [step for step in load_graph(path).plan.steps if is_engine(step.node)]
    if not steps:
        raise ConfigError(f"{path} has no engine among its nodes: nothing to plan")
    plans = {}
    for step in steps:
        gpus, on_gpu = num_gpus, None if num_gpus is None else num_gpus > 0
        if gpus is None:
            gpus = step.placement.num_gpus if step.placement else 0.0
            if not gpus:
                _say_where(step.name)
        try:
            plan = plan_engine(step.node, total, num_gpus=gpus, on_gpu=on_gpu, **shared)
            plans[step.name] = plan
        except ConfigError as error:
            raise ConfigError(f"node {step.name!r}: {error}") from None
    return plans


def _say_where(node: str) -> None:
    """An engine without ``num_gpus``, on a machine with a GPU: which memory is planned, and why."""
    from twinpath.nodes.llm_memory import card_bytes, takes_card

    if card_bytes() is None:
        return
    if takes_card():
        text = (
            "it is planned for this machine's GPU, which vLLM takes where it sees one. Ray hides "
            "it from replicas without num_gpus only with RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=1, "
            "and does not count it: give the node num_gpus"
        )
    else:
        text = (
            "it is planned for this machine's memory, not for its GPU, which vLLM's CPU build does "
            "not use and Ray hides with RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=1. --num-gpus 1 plans "
            "the GPU"
        )
    _stderr().print(f"node {node!r} has no num_gpus: {text}", markup=False)


def _stderr() -> Console:
    return Console(stderr=True, soft_wrap=True, highlight=False)


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
