"""``python -m benchmarks list`` and ``python -m benchmarks run NAME [--rounds N]``."""

import argparse
from pathlib import Path

from rich.console import Console

from benchmarks import (
    feature_join,
    feature_lookup,
    feature_serving,
    gateway_cost,
    llm_offline,
    llm_routing,
    llm_serving,
    memory,
    offline_flights,
    online_fused,
    registry_swaps,
    rollout_cost,
    rollout_guard,
)
from benchmarks.llm_model import published_as
from benchmarks.online import bench, publishing
from benchmarks.report import publish
from twinpath.online.session import interrupt_once

ALL = {
    "online_fused": online_fused,
    "offline_flights": offline_flights,
    "gateway_cost": gateway_cost,
    "memory": memory,
    "rollout_guard": rollout_guard,
    "rollout_cost": rollout_cost,
    "registry_swaps": registry_swaps,
    "online": bench,
    "llm_serving": llm_serving,
    "feature_lookup": feature_lookup,
    "feature_serving": feature_serving,
    "llm_offline": llm_offline,
    "feature_join": feature_join,
    "llm_routing": llm_routing,
}
ROUNDS = 3


def main() -> None:
    """The command line."""
    interrupt_once()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="name what there is to run")
    run = commands.add_parser("run", help="run one benchmark, or --all")
    run.add_argument("name", nargs="?", choices=sorted(ALL))
    run.add_argument("--all", action="store_true")
    run.add_argument(
        "--rounds", type=int,
        help=f"alternated rounds (default {ROUNDS}; online: {publishing.ROUNDS})",
    )  # fmt: skip
    publishing.options(run)
    given = parser.parse_args()
    console = Console()
    if not console.is_terminal:
        console = Console(width=130)
    if given.command == "list":
        for name, module in ALL.items():
            console.print(f"{name:16} {(module.__doc__ or '').splitlines()[0]}")
        return
    if bool(given.name) == given.all:
        parser.error("name one benchmark, or pass --all")
    choice = publishing.chosen(given)
    if given.name != "online" and not choice.whole:
        parser.error(
            "--only, --peers, --connections, --seconds and --merge are the online benchmark's"
        )
    for name in ALL if given.all else (given.name,):
        console.print(f"written: {_run(name, given.rounds, console, choice)}")


def _run(name: str, rounds: int | None, console: Console, choice: bench.Choice) -> Path:
    if name == "online":
        return publishing.run_and_publish(rounds, console, choice)
    rows = ALL[name].run(rounds or ROUNDS, console)
    return publish(published_as(name) if name.startswith("llm_") else name, rows, console)


if __name__ == "__main__":
    main()
