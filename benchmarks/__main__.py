"""``python -m benchmarks list`` and ``python -m benchmarks run NAME [--rounds N]``."""

import argparse

from rich.console import Console

from benchmarks import offline_flights, online_fused
from benchmarks.report import publish
from twinpath.online.session import interrupt_once

ALL = {"online_fused": online_fused, "offline_flights": offline_flights}


def main() -> None:
    """The command line."""
    interrupt_once()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="name what there is to run")
    run = commands.add_parser("run", help="run one benchmark, or --all")
    run.add_argument("name", nargs="?", choices=sorted(ALL))
    run.add_argument("--all", action="store_true")
    run.add_argument("--rounds", type=int, default=3, help="alternated rounds (default 3)")
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
    for name in ALL if given.all else (given.name,):
        path = publish(name, ALL[name].run(given.rounds, console), console)
        console.print(f"written: {path}")


if __name__ == "__main__":
    main()
