"""One graph served twice by one Serve: with a gateway, and without.

The gateway asks for an API key, counts a rate limit and writes a line of JSON for each request. The
two are loaded in turns, so that the machine's drift cancels.
"""

from pathlib import Path
from statistics import median
from typing import Any

import yaml
from rich.console import Console

from benchmarks.online import environments, models
from benchmarks.online.peers import SERVERS
from benchmarks.online.served import ROOT
from benchmarks.online.workloads import WORKLOADS, asked
from benchmarks.report import Row
from benchmarks.wrk import Load, load
from twinpath.online.gateway.keys import new_key, write_keys
from twinpath.online.session import ServeSession

MODEL = "tabular"
CONNECTIONS = (1, 32)
SECONDS = 2


def run(rounds: int, console: Console) -> list[Row]:
    """Median figures of alternated rounds. Raises SystemExit when a request fails."""
    trained = environments.folder() / "models"
    models.train(trained)
    form = SERVERS["twinpath"].form
    assert form is not None
    given = asked(WORKLOADS[MODEL], form)
    seen: dict[str, dict[int, list[Load]]] = {
        way: {connections: [] for connections in CONNECTIONS} for way in ("guarded", "open")
    }
    variables = {models.FOLDER_VARIABLE: str(trained), "OMP_NUM_THREADS": "1"}
    with ServeSession(num_cpus=8, pythonpath=[ROOT / "platform", ROOT], env=variables) as session:
        key, record = new_key("bench")
        write_keys(session.folder / "keys", [record])
        gateway = gateway_of(session.folder)
        applications = [
            {
                "name": way,
                "route_prefix": f"/{way}",
                "import_path": f"benchmarks.online.graphs:{MODEL}",
                "args": {"gateway": gateway} if way == "guarded" else {},
            }
            for way in seen
        ]
        config = session.folder / "app.yaml"
        config.write_text(yaml.safe_dump({"applications": applications}))
        session.deploy(config)
        headers = dict(given.headers) | {"x-api-key": key}
        for way in seen:
            session.wait_until_ready(f"/{way}/readyz")
            load(_url(session, way), given.bodies, 8, 2, headers)
        for number in range(rounds):
            for way in seen if number % 2 == 0 else reversed(seen):
                for connections in CONNECTIONS:
                    with console.status(f"round {number + 1} of {rounds}: {way}"):
                        result = load(
                            _url(session, way), given.bodies, connections, SECONDS, headers
                        )
                    if result.bad:
                        raise SystemExit(f"{result.bad} requests failed, {way}")
                    seen[way][connections].append(result)
    rows = []
    for connections in CONNECTIONS:
        at = f"{connections} connection{'s' if connections > 1 else ''}"
        for figure, unit, target in (("per_s", "req/s", ">= 0.9"), ("p50_ms", "ms (p50)", None)):
            ours, plain = (
                median(getattr(one, figure) for one in seen[way][connections]) for way in seen
            )
            last = connections == CONNECTIONS[-1]
            rows.append(Row(at, unit, ours, plain, "without a gateway", target if last else None))
    return rows


def gateway_of(folder: Path) -> dict[str, Any]:
    """A key, a rate that nobody reaches, and an audit log."""
    return {
        "api_keys": str(folder / "keys"),
        "limits": {"rate": "1000000/second"},
        "audit_log": str(folder / "audit.jsonl"),
    }


def _url(session: ServeSession, way: str) -> str:
    return f"{session.url}/{way}/v2/models/{MODEL}/infer"
