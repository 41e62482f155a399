"""From what was measured to rows with targets, a Markdown table, and the JSON document."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from benchmarks.online.peers import OURS, SERVERS
from benchmarks.online.workloads import WORKLOADS
from benchmarks.report import Row
from benchmarks.wrk import Load

CONNECTIONS = (1, 8, 32, 128)
UNITS = {"per_s": "req/s", "p50_ms": "ms (p50)", "p99_ms": "ms (p99)"}
#: (workload, connections, figure, server) → target of the ratio of ours to the server's.
TARGETS: Mapping[tuple[str, int, str, str], str] = {
    ("tabular", 32, "per_s", "triton"): ">= 1.0",
    ("tabular", 32, "per_s", "serve"): ">= 12",
    ("tabular", 1, "p50_ms", "triton"): "<= 1.2",
    ("tabular", 32, "p99_ms", "triton"): "<= 1.5",
    ("tabular64", 32, "per_s", "triton"): ">= 1.0",
    ("tabular64-binary", 32, "per_s", "triton"): ">= 0.9",
    ("torch", 32, "per_s", "triton"): ">= 1.0",
} | {
    ("torch", 32, "per_s", name): ">= 2"
    for name, server in SERVERS.items()
    if server.python or name == "serve"
}
#: Workload → target against the best Python peer at 32 connections.
BEST_PYTHON: Mapping[str, str] = {"tabular": ">= 6", "torch": ">= 2"}
#: Ours at 128 connections against ours at 32.
STEADY = ">= 0.85"


@dataclass
class Measured:
    """Loads of every round by (workload, server, connections), why a server is missing from a
    model by (server, model), and what the servers of a model take of one core while they wait."""

    loads: dict[tuple[str, str, int], list[Load]] = field(default_factory=dict)
    failures: dict[tuple[str, str], str] = field(default_factory=dict)
    idle_percent: dict[str, float] = field(default_factory=dict)

    def add(self, workload: str, server: str, connections: int, load: Load) -> None:
        """One more round of a cell."""
        self.loads.setdefault((workload, server, connections), []).append(load)

    def median(self, workload: str, server: str, connections: int, figure: str) -> float | None:
        """A cell's figure over the rounds; None when it was not measured."""
        loads = self.loads.get((workload, server, connections))
        return median(getattr(load, figure) for load in loads) if loads else None

    def bad(self, workload: str, server: str, connections: int) -> int:
        """Answers of all rounds that were no good."""
        return sum(load.bad for load in self.loads.get((workload, server, connections), ()))

    def fill_from(self, earlier: "Measured") -> None:
        """Take over from an earlier run what this one did not measure. A workload at a number of
        connections comes from one run with all its servers, so that what is compared was always
        measured together."""
        mine = {(workload, connections) for workload, _, connections in self.loads}
        models = {WORKLOADS[workload].model for workload, _ in mine}
        for (workload, server, connections), loads in earlier.loads.items():
            if (workload, connections) not in mine:
                self.loads[workload, server, connections] = loads
        for (server, model), reason in earlier.failures.items():
            if model not in models:
                self.failures[server, model] = reason
        self.idle_percent = earlier.idle_percent | self.idle_percent

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> "Measured":
        """What a result file holds, of workloads and servers that there still are."""
        names = {server.title: name for name, server in SERVERS.items()}
        found = cls(idle_percent=dict(document["idle_percent"]))
        for cell in document["measured"]:
            name, workload = names.get(cell["server"]), cell["workload"]
            if name is not None and workload in WORKLOADS:
                loads = [Load(**load) for load in cell["rounds"]]
                found.loads[workload, name, cell["connections"]] = loads
        for each in document["failures"]:
            if each["server"] in names:
                found.failures[names[each["server"]], each["model"]] = each["reason"]
        return found

    def rounds(self) -> str:
        """How many rounds each cell has, ``5`` or ``5 to 8``."""
        counts = {len(loads) for loads in self.loads.values()} or {0}
        least, most = min(counts), max(counts)
        return str(least) if least == most else f"{least} to {most}"

    def connections(self) -> list[int]:
        """Those that were measured."""
        return sorted({connections for _, _, connections in self.loads})

    def workloads(self) -> list[str]:
        """Those that were measured, in their order."""
        seen = {workload for workload, _, _ in self.loads}
        return [name for name in WORKLOADS if name in seen]

    def servers(self, workload: str) -> list[str]:
        """Those that were measured at a workload, or failed at it, in their order."""
        model = WORKLOADS[workload].model
        seen = {server for each, server, _ in self.loads if each == workload}
        return [name for name in SERVERS if name in seen or (name, model) in self.failures]


def rows(measured: Measured) -> list[Row]:
    """A row for each workload, number of connections, unit and peer."""
    found: list[Row] = []
    for workload in measured.workloads():
        for connections in measured.connections():
            found += _rows_at(measured, workload, connections)
        steady = [measured.median(workload, OURS, c, "per_s") for c in (128, 32)]
        if steady[0] and steady[1]:
            at = _at(workload, 128)
            found.append(Row(at, "req/s", *steady, f"{SERVERS[OURS].title} at 32", STEADY))
    return found


def _rows_at(measured: Measured, workload: str, connections: int) -> Iterator[Row]:
    at = _at(workload, connections)
    for figure, unit in UNITS.items():
        ours = measured.median(workload, OURS, connections, figure)
        if not ours:
            continue
        for name, server in SERVERS.items():
            theirs = measured.median(workload, name, connections, figure)
            if theirs and name != OURS:
                target = TARGETS.get((workload, connections, figure, name))
                yield Row(at, unit, ours, theirs, server.title, target)
    ours = measured.median(workload, OURS, connections, "per_s")
    best = best_python(measured, workload, connections)
    if ours and best and connections == 32:
        title = f"best Python peer ({SERVERS[best[0]].title})"
        yield Row(at, "req/s", ours, best[1], title, BEST_PYTHON.get(workload))


def best_python(measured: Measured, workload: str, connections: int) -> tuple[str, float] | None:
    """The quickest of the Python servers that are no Ray Serve, and its requests a second."""
    speeds = {
        name: speed
        for name, server in SERVERS.items()
        if server.python and name != OURS
        and (speed := measured.median(workload, name, connections, "per_s"))
    }  # fmt: skip
    name = max(speeds, key=speeds.__getitem__, default=None)
    return None if name is None else (name, speeds[name])


def _at(workload: str, connections: int) -> str:
    return f"{workload}, {connections} connection{'s' if connections > 1 else ''}"


def notes(measured: Measured, seconds: int) -> dict[str, Any]:
    """What the JSON document has beside its rows: all rounds, bad answers, and who is missing."""
    return {
        "rounds": measured.rounds(),
        "seconds": seconds,
        "idle_percent": measured.idle_percent,
        "failures": [
            {"server": SERVERS[name].title, "model": model, "reason": reason}
            for (name, model), reason in measured.failures.items()
        ],
        "measured": [
            {
                "workload": workload, "server": SERVERS[name].title, "connections": connections,
                "rounds": [asdict(load) for load in loads],
            }
            for (workload, name, connections), loads in measured.loads.items()
        ],
    }  # fmt: skip


def markdown(measured: Measured, found: Sequence[Row]) -> str:
    """Medians as tables, one for each workload, then targets and failures."""
    lines = [
        "# Online serving, measured",
        "",
        f"Medians of {measured.rounds()} alternated rounds. Cells are requests a second, then "
        "p50 / p99 in milliseconds. A workload at a number of connections was measured in one "
        "run with all its servers. The load generator runs on the same machine.",
    ]
    connections = measured.connections()
    for workload in measured.workloads():
        heads = [f"{c} connection{'s' if c > 1 else ''}" for c in connections]
        lines += ["", f"## {workload}", "", f"| | {' | '.join(heads)} |"]
        lines.append(f"|---|{'---:|' * len(heads)}")
        for name in measured.servers(workload):
            cells = [_cell(measured, workload, name, c) for c in connections]
            lines.append(f"| {SERVERS[name].title} | {' | '.join(cells)} |")
    aimed = [row for row in found if row.target]
    if aimed:
        lines += ["", "## Targets", "", "| | unit | ours | against | theirs | ratio | target | |"]
        lines.append("|---|---|---:|---|---:|---:|---|---|")
        lines += [
            f"| {row.metric} | {row.unit} | {_number(row.ours)} | {row.peer_name} "
            f"| {_number(row.peer)} | {row.ratio:.2f} | {row.target} "
            f"| {'met' if row.met else '**missed**'} |"
            for row in aimed
        ]
    if measured.failures:
        lines += ["", "## Not measured", ""]
        for (name, model), reason in measured.failures.items():
            lines.append(f"- {SERVERS[name].title}, {model}: `{' '.join(reason.split())[:300]}`")
    return "\n".join(lines) + "\n"


def _cell(measured: Measured, workload: str, server: str, connections: int) -> str:
    if (server, connections) not in {(s, c) for w, s, c in measured.loads if w == workload}:
        return "failed" if (server, WORKLOADS[workload].model) in measured.failures else "–"
    per_s, p50_ms, p99_ms = (
        measured.median(workload, server, connections, figure) or 0.0 for figure in UNITS
    )
    bad = measured.bad(workload, server, connections)
    text = f"{_number(per_s)} ({_number(p50_ms)} / {_number(p99_ms)})"
    return f"{text}, {bad:,} bad" if bad else text


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
