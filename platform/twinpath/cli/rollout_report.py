"""Rollouts as text on the terminal."""

import datetime as dt
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

_COLOURS = {
    "running": "cyan", "paused": "yellow", "promoted": "green", "rolled_back": "red",
    "aborted": "magenta",
}  # fmt: skip


def print_status(found: dict[str, Any], console: Console) -> None:
    """Print a model's rollout, and its versions where they are told."""
    state = found.get("rollout")
    if state is None:
        console.print(Text(f"{found['model']}: no rollout so far"))
    else:
        _print_rollout(state, found.get("live") or {}, console)
    versions = found.get("versions")
    if versions:
        table = _table("Versions", "version", "aliases", "reports", "refused")
        for each in versions:
            gates = ", ".join(
                f"{kind} {'passed' if gate['passed'] else 'failed'}"
                for kind, gate in each["gates"].items()
            )
            table.add_row(
                each["version"], ", ".join(each["aliases"]), gates, Text(each["refused"] or "")
            )
        console.print(table)
    for replica in found.get("replicas", ()):
        problem = replica.get("registry", {}).get("problem")
        text = f"replica {replica['replica']}: serves {replica.get('serving')}"
        console.print(Text(text + (f"; registry: {problem}" if problem else ""), style="dim"))


def print_history(lines: Sequence[dict[str, Any]], console: Console) -> None:
    """Print audit lines, one a row."""
    table = _table("History", "time", "version", "event", "share", "by", "reason")
    for line in lines:
        table.add_row(
            str(line["time"])[:19], f"{line['incumbent']} → {line['challenger']}",
            Text(str(line["event"])), f"{line['share']:.0%}", Text(str(line["by"])),
            Text(str(line["reason"])),
        )  # fmt: skip
    console.print(table)


def print_backtest(found: dict[str, Any], console: Console) -> None:
    """Print a backtest's verdict and its figures."""
    _print_verdict(found, "; ".join(found["reasons"]), console)
    table = _table("Differences", "figure", "segment", "rows", "size", "at least", "threshold")
    for each in found["differences"]:
        table.add_row(
            each["figure"], Text(each["segment"] or "all"), f"{each['rows']:,}",
            _number(each["size"]), _number(each["low"]), _number(each["threshold"]),
        )  # fmt: skip
    console.print(table)
    _print_files(found, console)


def print_loadtest(found: dict[str, Any], console: Console) -> None:
    """Print a load test's verdict and the times of both versions."""
    _print_verdict(found, found["reason"], console)
    table = _table("Times", "version", "requests", "p50", "p99", "rows/s", "failed rows")
    for each in (found["incumbent"], found["challenger"]):
        table.add_row(
            each["version"], f"{each['requests']:,}", f"{each['p50_ms']:.2f} ms",
            f"{each['p99_ms']:.2f} ms", f"{each['rows_per_s']:,.0f}", str(each["failed"]),
        )  # fmt: skip
    console.print(table)
    _print_files(found, console)


def _print_rollout(state: dict[str, Any], live: dict[str, Any], console: Console) -> None:
    status = state["status"]
    console.print(
        Text.assemble(
            (state["model"], "bold"),
            f"  version {state['incumbent']} → {state['challenger']}  {state['kind']}  ",
            (status, _COLOURS.get(status, "")),
            ("  " + state["id"], "dim"),
        )
    )
    steps = " → ".join(f"{share:.0%}" for share in state["steps"])
    since = dt.datetime.fromtimestamp(state["step_started_s"], dt.UTC).isoformat(" ", "seconds")
    console.print(Text(f"steps {steps}; at {state['share']:.0%} since {since}"))
    if state["reason"]:
        console.print(Text(f"reason: {state['reason']}"))
    verdict = live.get("verdict")
    if verdict and state["live"]:
        console.print(Text(f"guard: {verdict['reason']}"))
    problem = live.get("registry", {}).get("problem")
    if problem:
        console.print(Text(f"stands still: {problem}", style="yellow"))


def _print_verdict(found: dict[str, Any], reason: str, console: Console) -> None:
    console.print(
        Text.assemble(("passed", "green") if found["passed"] else ("failed", "red"), f"  {reason}")
    )


def _print_files(found: dict[str, Any], console: Console) -> None:
    console.print(Text(f"report: {', '.join(found['files'])}", style="dim"))
    if found["kept"]:
        console.print(Text(f"kept as {found['kept']}", style="dim"))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _table(title: str, *headings: str) -> Table:
    table = Table(title=f"\n{title}", title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table
