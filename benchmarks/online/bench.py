"""The same models behind Triton, five Python servers, stock Ray Serve, and Twinpath.

A round takes one model after the other, and for each model starts every server once, asks it for
known answers, loads it at every number of connections, and stops it: only one server runs at a
time. Every second round goes through the servers backwards.
"""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from benchmarks.online import environments, models
from benchmarks.online.environments import PeerError
from benchmarks.online.figures import CONNECTIONS, Measured
from benchmarks.online.peers import SERVERS, Server
from benchmarks.online.workloads import WORKLOADS, Workload, asked, check
from benchmarks.wrk import Load, load
from graphs.flights_model.schema import flights_dir
from graphs.flights_model.train import ensure as ensure_flights

SECONDS = 4
_WARM_UP_S = 2
_WARM_UP_CONNECTIONS = 8
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

#: Workload, connections, and what was measured.
_Cell = tuple[str, int, Load]


@dataclass(frozen=True)
class Choice:
    """What to measure; the defaults are all of it."""

    workloads: Sequence[str] = tuple(WORKLOADS)
    servers: Sequence[str] = tuple(SERVERS)
    connections: Sequence[int] = CONNECTIONS
    seconds: int = SECONDS

    @property
    def whole(self) -> bool:
        """Whether nothing is left out, so that the result may be kept."""
        return self == Choice()

    def by_model(self) -> dict[str, list[Workload]]:
        """The chosen workloads of each model."""
        found: dict[str, list[Workload]] = {}
        for workload in WORKLOADS.values():
            if workload.name in self.workloads:
                found.setdefault(workload.model, []).append(workload)
        return found


def run(rounds: int, console: Console, choice: Choice) -> Measured:
    """Every chosen server at every chosen workload, ``rounds`` times.

    A server that cannot be installed, started or believed is tried a second time, then noted with
    the reason and left out of that model's further rounds.
    """
    trained = environments.folder() / "models"
    models.train(trained)
    os.environ[models.FOLDER_VARIABLE] = str(trained)
    # A thread each for numpy and torch, in every server: two cores have no more to give.
    os.environ |= dict.fromkeys(_THREADS, "1")
    if "flights" in choice.workloads:
        ensure_flights(flights_dir())
    measured = Measured()
    for number in range(rounds):
        for model, workloads in choice.by_model().items():
            names = [name for name in SERVERS if name in choice.servers]
            for name in names if number % 2 == 0 else reversed(names):
                server = SERVERS[name]
                if model not in server.models or (name, model) in measured.failures:
                    continue
                with console.status(f"round {number + 1} of {rounds}: {server.title}, {model}"):
                    found, reason = _tried(server, model, workloads, choice)
                if reason:
                    measured.failures[name, model] = reason
                    console.print(f"{server.title}, {model}: {reason}", style="red", markup=False)
                for workload, connections, result in found:
                    measured.add(workload, name, connections, result)
                _tell(console, measured, name, workloads, choice.connections)
    return measured


def _tried(
    server: Server, model: str, workloads: Sequence[Workload], choice: Choice
) -> tuple[list[_Cell], str]:
    """Its cells, or why there are none, after a second try."""
    reason = ""
    for _ in range(2):
        try:
            return _measure(server, model, workloads, choice), ""
        except PeerError as error:
            reason = str(error)
        except Exception as error:  # an hour's run is not lost for one server's surprise
            reason = f"{type(error).__name__}: {error}"
    return [], reason


def _measure(
    server: Server, model: str, workloads: Sequence[Workload], choice: Choice
) -> list[_Cell]:
    found: list[_Cell] = []
    with tempfile.TemporaryDirectory() as folder, server.serve(model, Path(folder)) as url:
        for workload in workloads:
            form = server.binary if workload.binary else server.form
            if form is None:
                continue
            check(workload, form, url)
            given = asked(workload, form)
            load(url, given.bodies, _WARM_UP_CONNECTIONS, _WARM_UP_S, given.headers)
            for connections in choice.connections:
                result = load(url, given.bodies, connections, choice.seconds, given.headers)
                found.append((workload.name, connections, result))
    return found


def _tell(
    console: Console,
    measured: Measured,
    name: str,
    workloads: Sequence[Workload],
    connections: Sequence[int],
) -> None:
    """One line for each workload: requests a second, in the order of the connections."""
    for workload in workloads:
        loads = [measured.loads.get((workload.name, name, c), []) for c in connections]
        if all(loads):
            figures = "  ".join(f"{each[-1].per_s:8,.0f}" for each in loads)
            bad = sum(each[-1].bad for each in loads)
            suffix = f"  [red]{bad} bad answers[/]" if bad else ""
            console.print(f"{SERVERS[name].title:28} {workload.name:18} {figures}{suffix}")
