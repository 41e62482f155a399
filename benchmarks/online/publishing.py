"""Where the online benchmark's result goes: table, JSON, Markdown and picture."""

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from rich.console import Console

from benchmarks.online.bench import Choice, run
from benchmarks.online.figures import CONNECTIONS, Measured, markdown, notes, rows
from benchmarks.online.peers import SERVERS
from benchmarks.online.picture import plot
from benchmarks.online.workloads import WORKLOADS
from benchmarks.report import RESULTS, publish

ROUNDS = 5
#: A part of the benchmark is no result to keep: it goes where git does not look.
_PARTS = Path(".twinpath") / "benchmarks"


def options(parser: argparse.ArgumentParser) -> None:
    """Options that restrict it, for a quick look."""
    part = Choice()
    listed = ", ".join
    parser.add_argument(
        "--only", type=_names(WORKLOADS), default=part.workloads, metavar="WORKLOADS",
        help=f"online: of {listed(WORKLOADS)}",
    )  # fmt: skip
    parser.add_argument(
        "--peers", type=_names(SERVERS), default=part.servers, metavar="SERVERS",
        help=f"online: of {listed(SERVERS)}",
    )  # fmt: skip
    parser.add_argument(
        "--connections", type=_numbers, default=part.connections, metavar="NUMBERS",
        help=f"online: default {','.join(map(str, CONNECTIONS))}",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=int, default=part.seconds, help="online: measured in each cell"
    )
    parser.add_argument(
        "--merge", action="store_true",
        help="online: what is measured takes its place in the kept result, the rest of which stays",
    )  # fmt: skip


def chosen(given: argparse.Namespace) -> Choice:
    """What the options say."""
    return Choice(given.only, given.peers, given.connections, given.seconds, given.merge)


def run_and_publish(rounds: int | None, console: Console, choice: Choice) -> Path:
    """Measure and write; the path of the JSON. Only the whole benchmark goes to ``results``,
    or what is merged with it."""
    measured = run(rounds or ROUNDS, console, choice)
    earlier = RESULTS / "online.json"
    if choice.merge and earlier.exists():
        measured.fill_from(Measured.from_document(json.loads(earlier.read_text())))
    found = rows(measured)
    folder = RESULTS if choice.whole or choice.merge else _PARTS
    path = publish(
        "online", found, console,
        beside=notes(measured, choice.seconds), folder=folder, picture=False,
        shown=[row for row in found if row.target],
    )  # fmt: skip
    path.with_suffix(".md").write_text(markdown(measured, found))
    if measured.loads:
        plot(measured, path.with_suffix(".png"))
    return path


def _names(known: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    allowed = list(known)

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"{name!r}: expected of {', '.join(allowed)}")
        return names

    return parse


def _numbers(text: str) -> tuple[int, ...]:
    numbers = tuple(int(part) for part in text.split(","))
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected numbers of at least 1")
    return numbers
