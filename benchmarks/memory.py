"""The memory of a replica over a million requests, in JSON and in binary, through the gateway.

Resident memory at the end, against what it was after the first tenth: what a request leaves behind
would show a million times.
"""

from statistics import median

import psutil
import yaml
from rich.console import Console

from benchmarks.gateway_cost import gateway_of
from benchmarks.online import environments, models
from benchmarks.online.peers import SERVERS
from benchmarks.online.served import ROOT
from benchmarks.online.workloads import WORKLOADS, asked
from benchmarks.report import Row
from benchmarks.wrk import load
from twinpath.online.gateway.keys import new_key, write_keys
from twinpath.online.session import ServeSession

REQUESTS = 1_000_000
MODEL = "tabular"
CONNECTIONS = 64
SECONDS = 4
_MIB = 2**20


def run(rounds: int, console: Console) -> list[Row]:
    """One run, however many rounds are asked for. Raises SystemExit when a request fails."""
    trained = environments.folder() / "models"
    models.train(trained)
    server = SERVERS["twinpath"]
    assert server.binary is not None
    ways = [
        asked(WORKLOADS[MODEL], server.form),
        asked(WORKLOADS["tabular64-binary"], server.binary),
        asked(WORKLOADS["tabular64"], server.form),
    ]
    seen: list[tuple[float, float]] = []
    variables = {models.FOLDER_VARIABLE: str(trained), "OMP_NUM_THREADS": "1"}
    with ServeSession(num_cpus=8, pythonpath=[ROOT / "platform", ROOT], env=variables) as session:
        key, record = new_key("bench")
        write_keys(session.folder / "keys", [record])
        app = {
            "name": MODEL,
            "route_prefix": f"/{MODEL}",
            "import_path": f"benchmarks.online.graphs:{MODEL}",
            "args": {"gateway": gateway_of(session.folder)},
        }
        config = session.folder / "app.yaml"
        config.write_text(yaml.safe_dump({"applications": [app]}))
        session.deploy(config)
        session.wait_until_ready(f"/{MODEL}/readyz")
        url = f"{session.url}/{MODEL}/v2/models/{MODEL}/infer"
        [replica] = [
            each for each in session.processes() if f"ServeReplica:{MODEL}:" in _title(each)
        ]
        done, turn = 0.0, 0
        while done < REQUESTS:
            # Mostly small ones, which are many.
            given = ways[0] if turn % 4 < 2 else ways[turn % 4 - 1]
            turn += 1
            headers = dict(given.headers) | {"x-api-key": key}
            with console.status(f"{done:,.0f} of {REQUESTS:,} requests"):
                result = load(url, given.bodies, CONNECTIONS, SECONDS, headers)
            if result.bad:
                raise SystemExit(f"{result.bad} requests failed")
            done += result.per_s * SECONDS
            seen.append((done, replica.memory_info().rss / _MIB))
    early = [mib for count, mib in seen if count <= REQUESTS * 0.2] or [seen[0][1]]
    late = [mib for count, mib in seen if count >= REQUESTS * 0.9]
    return [
        Row(
            "a replica's memory after 10⁶ requests", "MiB", median(late), median(early),
            "after the first tenths", "<= 1.05",
        )
    ]  # fmt: skip


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
