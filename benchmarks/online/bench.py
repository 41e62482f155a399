"""The same models behind Triton, five Python servers, stock Ray Serve, and Twinpath.

For each model every server is started and asked for known answers. Then rounds take one server
after the other at every number of connections, while the processes of the others are stopped with
SIGSTOP: several poll, one of them for a whole core, even when nobody asks. Every second round goes
backwards.
"""

import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console

from benchmarks.online import environments, models
from benchmarks.online.environments import PeerError
from benchmarks.online.figures import CONNECTIONS, Measured
from benchmarks.online.peers import SERVERS, Server
from benchmarks.online.processes import Served
from benchmarks.online.workloads import WORKLOADS, Workload, asked, check
from benchmarks.wrk import Load, load
from graphs.flights_model.schema import flights_dir
from graphs.flights_model.train import ensure as ensure_flights

SECONDS = 2
_WARM_UP_S = 1
_WARM_UP_CONNECTIONS = 8
_IDLE_S = 5.0
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
    #: Whether the rest of the kept result stays.
    merge: bool = False

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
    the reason and left out of that model; so is one that breaks later.
    """
    trained = environments.folder() / "models"
    models.train(trained)
    os.environ[models.FOLDER_VARIABLE] = str(trained)
    # A thread each for numpy and torch, in every server: two cores have no more to give.
    os.environ |= dict.fromkeys(_THREADS, "1")
    if "flights" in choice.workloads:
        ensure_flights(flights_dir())
    measured = Measured()
    for model, workloads in choice.by_model().items():
        with ExitStack() as servers:
            running: dict[str, Served] = {}
            for name in choice.servers:
                if model not in SERVERS[name].models:
                    continue
                with console.status(f"starting {SERVERS[name].title}, {model}"):
                    served = _started(SERVERS[name], model, workloads, servers)
                if isinstance(served, str):
                    _note(console, measured, name, model, served)
                else:
                    running[name] = served
            idle = psutil.cpu_percent(_IDLE_S) * (psutil.cpu_count() or 1)
            measured.idle_percent[model] = idle
            console.print(f"{model}: {len(running)} stopped servers take {idle:.0f} % of one core")
            for number in range(rounds):
                for name in list(running) if number % 2 == 0 else list(reversed(running)):
                    with console.status(f"round {number + 1} of {rounds}: {name}, {model}"):
                        try:
                            found = _measure(SERVERS[name], running[name], workloads, choice)
                        except Exception as error:  # an hour's run is not lost for one surprise
                            reason = f"{type(error).__name__}: {error}"
                            again = _started(SERVERS[name], model, workloads, servers)
                            if isinstance(again, str):
                                del running[name]
                                _note(console, measured, name, model, reason)
                            else:  # it misses this round
                                running[name] = again
                                console.print(f"{name} was started anew: {reason}", markup=False)
                            continue
                    for workload, connections, result in found:
                        measured.add(workload, name, connections, result)
                    _tell(console, measured, name, workloads, choice.connections)
    return measured


def _started(
    server: Server, model: str, workloads: Sequence[Workload], servers: ExitStack
) -> Served | str:
    """The server, checked, warm and paused, until ``servers`` closes; or why there is none, after
    a second try."""
    reason = ""
    for _ in range(2):
        with ExitStack() as mine:
            try:
                folder = mine.enter_context(tempfile.TemporaryDirectory())
                served = mine.enter_context(server.serve(model, Path(folder)))
                mine.callback(served.resume)  # or it could not end
                for workload, form in _forms(server, workloads):
                    check(workload, form, served.url)
                    given = asked(workload, form)
                    load(served.url, given.bodies, _WARM_UP_CONNECTIONS, _WARM_UP_S, given.headers)
                served.pause()
            except PeerError as error:
                reason = str(error)
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
            else:
                servers.push(mine.pop_all())
                return served
    return reason


def _measure(
    server: Server, served: Served, workloads: Sequence[Workload], choice: Choice
) -> list[_Cell]:
    found: list[_Cell] = []
    served.resume()
    try:
        for workload, form in _forms(server, workloads):
            given = asked(workload, form)
            load(served.url, given.bodies, _WARM_UP_CONNECTIONS, _WARM_UP_S, given.headers)
            for connections in choice.connections:
                result = load(served.url, given.bodies, connections, choice.seconds, given.headers)
                found.append((workload.name, connections, result))
    finally:
        served.pause()
    return found


def _forms(server: Server, workloads: Sequence[Workload]) -> list[tuple[Workload, str]]:
    """The workloads that it can be asked, and in which form."""
    forms = ((each, server.binary if each.binary else server.form) for each in workloads)
    return [(workload, form) for workload, form in forms if form is not None]


def _note(console: Console, measured: Measured, name: str, model: str, reason: str) -> None:
    measured.failures[name, model] = reason
    console.print(f"{SERVERS[name].title}, {model}: {reason}", style="red", markup=False)


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
