"""Backtest and load test from the command line: run, write the report, keep the verdict."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from twinpath.cli.loading import load_graph
from twinpath.errors import ConfigError, InputError
from twinpath.graph.plan import Plan
from twinpath.nodes.pinned import registry_step
from twinpath.nodes.registry import RegistryModel
from twinpath.online.rollouts.desk import Desk
from twinpath.online.rollouts.gates import Gate
from twinpath.registry.client import Registry

#: Rows of a source that a load test asks; it goes round.
_LOAD_ROWS = 10_000


def run_backtest(
    graph: str,
    data: Path,
    challenger: str,
    *,
    incumbent: str | None,
    model: str | None,
    segments: Sequence[str],
    label: str | None,
    thresholds: Mapping[str, float],
    output: Path,
    workers: int,
    keep: bool,
) -> dict[str, Any]:
    """The report, in JSON types, with ``files`` and ``kept``. Raises TwinpathError."""
    from pydantic import ValidationError

    from twinpath.offline.backtest import BacktestJob
    from twinpath.rollout.plots import picture
    from twinpath.rollout.state import Thresholds

    plan = load_graph(graph).plan
    node: RegistryModel = registry_step(plan, model).node
    try:
        limits = Thresholds.model_validate(thresholds)
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        raise ConfigError(
            f"--threshold {'.'.join(map(str, wrong['loc']))}: {wrong['msg']}"
        ) from None
    desk = Desk(Registry(node.tracking_uri, timeout_s=30.0))
    against = incumbent or _serving(desk, node)
    total = BacktestJob(
        plan, data, against, challenger, node.name, segments=segments, label=label,
        thresholds=limits, workers=workers,
    ).run()  # fmt: skip
    report = total.report()
    found = {"kind": "backtest", "model": node.name, "data": data.name} | report.as_dict()
    files = _written(output, "backtest", found)
    plot = output / "backtest.png"
    plot.write_bytes(picture(total, report))
    files.append(plot)
    figures = {"rows": report.rows, "mean_change": report.mean_change, "crossed": report.crossed}
    reason = "; ".join(report.reasons)
    gate = Gate("backtest", report.passed, against, time.time(), reason, figures)
    kept = desk.keep_gate(node.name, challenger, gate, files) if keep else ""
    return found | {"files": [str(file) for file in files], "kept": kept}


def run_loadtest(
    graph: str,
    data: Path,
    challenger: str,
    *,
    incumbent: str | None,
    model: str | None,
    clients: int,
    rows: int,
    seconds: float,
    ratio: float,
    output: Path,
    keep: bool,
) -> dict[str, Any]:
    """The report, in JSON types, with ``files`` and ``kept``. Raises TwinpathError."""
    from twinpath.online.rollouts.loadtest import LoadTest

    plan = load_graph(graph).plan
    node: RegistryModel = registry_step(plan, model).node
    desk = Desk(Registry(node.tracking_uri, timeout_s=30.0))
    against = incumbent or _serving(desk, node)
    report = LoadTest(
        plan, _columns(plan, data), against, challenger, node.name, clients=clients, rows=rows,
        seconds=seconds, ratio=ratio,
    ).run()  # fmt: skip
    found = {"kind": "loadtest", "model": node.name, "data": data.name} | report.as_dict()
    files = _written(output, "loadtest", found)
    now = report.challenger
    figures = {"p50_ms": now.p50_ms, "p99_ms": now.p99_ms, "rows_per_s": now.rows_per_s}
    gate = Gate("loadtest", report.passed, against, time.time(), report.reason, figures)
    kept = desk.keep_gate(node.name, challenger, gate, files) if keep else ""
    return found | {"files": [str(file) for file in files], "kept": kept}


def _serving(desk: Desk, node: RegistryModel) -> str:
    found = desk.registry.state(node.name).aliases.get(node.alias)
    if found is None:
        raise ConfigError(
            f"model {node.name!r} has no alias {node.alias!r}: name the version to compare with, "
            "--incumbent"
        )
    return found


def _columns(plan: Plan, data: Path) -> Any:
    """The rows of a file that fit the graph's input."""
    import pandas as pd

    if not data.exists():
        raise InputError(f"{str(data)!r} does not exist")
    frame = pd.read_csv(data) if data.suffix == ".csv" else pd.read_parquet(data)
    known = [name for name in plan.input_schema.fields if name in frame.columns]
    return plan.input_schema.from_frame(frame[known].head(_LOAD_ROWS)).columns


def _written(folder: Path, name: str, found: Mapping[str, Any]) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    file.write_text(json.dumps(found, indent=2, default=float) + "\n")
    return [file]
