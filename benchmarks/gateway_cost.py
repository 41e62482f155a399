"""One graph served twice by one Serve: with a gateway, and without.

The gateway asks for an API key, counts a rate limit and writes a line of JSON for each request. The
two are loaded in turns, so that the machine's drift cancels, and each has several replicas that are
loaded one by one: processes that run the same code differ by 3 %, from where their memory lies.
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
#: Replicas of each way.
COPIES = 3
WAYS = ("guarded", "open")


def run(rounds: int, console: Console) -> list[Row]:
    """Median figures of alternated rounds. Raises SystemExit when a request fails."""
    trained = environments.folder() / "models"
    models.train(trained)
    form = SERVERS["twinpath"].form
    assert form is not None
    given = asked(WORKLOADS[MODEL], form)
    seen: dict[str, dict[int, list[Load]]] = {
        way: {connections: [] for connections in CONNECTIONS} for way in WAYS
    }
    apps = [f"{way}-{copy}" for copy in range(COPIES) for way in WAYS]
    variables = {models.FOLDER_VARIABLE: str(trained), "OMP_NUM_THREADS": "1"}
    with ServeSession(num_cpus=8, pythonpath=[ROOT / "platform", ROOT], env=variables) as session:
        key, record = new_key("bench")
        write_keys(session.folder / "keys", [record])
        gateway = gateway_of(session.folder)
        applications = [
            {
                "name": app,
                "route_prefix": f"/{app}",
                "import_path": f"benchmarks.online.graphs:{MODEL}",
                "args": {"gateway": gateway} if app.startswith("guarded") else {},
            }
            for app in apps
        ]
        config = session.folder / "app.yaml"
        config.write_text(yaml.safe_dump({"applications": applications}))
        session.deploy(config)
        headers = dict(given.headers) | {"x-api-key": key}
        for app in apps:
            session.wait_until_ready(f"/{app}/readyz")
            load(_url(session, app), given.bodies, 8, 2, headers)
        for number in range(rounds):
            for app in apps if number % 2 == 0 else reversed(apps):
                for connections in CONNECTIONS:
                    with console.status(f"round {number + 1} of {rounds}: {app}"):
                        result = load(
                            _url(session, app), given.bodies, connections, SECONDS, headers
                        )
                    if result.bad:
                        raise SystemExit(f"{result.bad} requests failed, {app}")
                    seen[app.partition("-")[0]][connections].append(result)
    rows = []
    for connections in CONNECTIONS:
        at = f"{connections} connection{'s' if connections > 1 else ''}"
        for figure, unit, target in (("per_s", "req/s", ">= 0.9"), ("p50_ms", "ms (p50)", None)):
            ours, plain = (
                median(getattr(one, figure) for one in seen[way][connections]) for way in WAYS
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


def _url(session: ServeSession, app: str) -> str:
    return f"{session.url}/{app}/v2/models/{MODEL}/infer"
