"""Twenty swaps of a served model's version under load: failed requests, tail latency and memory.

The peer is the same server just before and after, with the same load and no swaps.
"""

import threading
import time
from statistics import mean

import httpx
import psutil
import yaml
from rich.console import Console

from benchmarks import swap_graph
from benchmarks.online.served import ROOT
from benchmarks.report import Row
from benchmarks.wrk import Load, load
from twinpath.online.session import ServeSession

SWAPS = 20
CONNECTIONS = 32
STEADY_S = 12
SWAPPING_S = 50
#: Between a swap and the next; the old version drains and is unloaded meanwhile.
PAUSE_S = 1.5
_RETURNS_S = 20.0


def run(rounds: int, console: Console) -> list[Row]:
    """One run of twenty swaps, however many rounds. Raises SystemExit when they do not get done."""
    with ServeSession(
        num_cpus=8, pythonpath=[ROOT / "platform", ROOT], env={"OMP_NUM_THREADS": "1"}
    ) as session:
        folder = session.folder / "registry"
        folder.mkdir()
        uri = swap_graph.register(folder, SWAPS + 1)
        config = session.folder / "app.yaml"
        application = {
            "name": swap_graph.NAME,
            "route_prefix": "/",
            "import_path": "benchmarks.swap_graph:app",
            "runtime_env": {
                "env_vars": {
                    swap_graph.URI_VARIABLE: uri,
                    "TWINPATH_CACHE": str(session.folder / "cache"),
                }
            },
        }
        config.write_text(yaml.safe_dump({"applications": [application]}))
        session.deploy(config)
        session.wait_until_ready()
        with console.status("without swaps"):
            _load(session, 5)
            before = _load(session, STEADY_S)
        replica = _replica(session)
        held_before = _resident(replica)
        with console.status("with swaps"):
            swaps = Swaps(session.url, uri)
            swaps.start()
            during = _load(session, SWAPPING_S)
            swaps.join(timeout=120)
        if swaps.problem or swaps.done < SWAPS:
            raise SystemExit(f"{swaps.done} of {SWAPS} swaps: {swaps.problem}")
        with console.status("without swaps"):
            after = _load(session, STEADY_S)
        held_after = _resident(replica)
    steady_ms = mean(one.p99_ms for one in (before, after))
    steady_per_s = mean(one.per_s for one in (before, after))
    asked = sum(one.per_s * s for one, s in ((before, STEADY_S), (during, SWAPPING_S)))
    bad = sum(one.bad for one in (before, during, after))
    console.print(f"{SWAPS} swaps, {mean(swaps.took_s):.1f} s each from the alias to the answer")
    return [
        Row("p99 during swaps", "ms", during.p99_ms, steady_ms, "without swaps", "<= 2"),
        Row("throughput", "req/s", during.per_s, steady_per_s, "without swaps"),
        Row("requests answered", "requests", asked - bad, asked, "requests asked", ">= 1"),
        Row("memory after", "MiB", held_after, held_before, "before", "<= 1.05"),
    ]


class Swaps(threading.Thread):
    """Lets the alias name one version after the other, each once the one before serves."""

    def __init__(self, url: str, uri: str) -> None:
        super().__init__(daemon=True)
        self._url, self._uri = url, uri
        self.done = 0
        self.problem = ""
        self.took_s: list[float] = []

    def run(self) -> None:
        """All of them."""
        from mlflow import MlflowClient

        client = MlflowClient(self._uri, self._uri)
        with httpx.Client(base_url=self._url, timeout=30) as http:
            for version in range(2, SWAPS + 2):
                began_s = time.monotonic()
                client.set_registered_model_alias(swap_graph.NAME, "champion", str(version))
                while True:
                    found = http.get(f"/v2/models/{swap_graph.NAME}").json()["versions"]
                    if found[0] == str(version):
                        break
                    if time.monotonic() - began_s > _RETURNS_S:
                        self.problem = http.get("/readyz").text
                        return
                    time.sleep(0.1)
                self.took_s.append(time.monotonic() - began_s)
                self.done += 1
                time.sleep(PAUSE_S)


def _load(session: ServeSession, seconds: float) -> Load:
    bodies = [b'{"rows": [{"x": [%s]}]}' % b",".join([b"0.25"] * swap_graph.WIDTH)]
    return load(f"{session.url}/{swap_graph.NAME}/predict", bodies, CONNECTIONS, seconds)


def _replica(session: ServeSession) -> psutil.Process:
    """The process of the ingress."""
    for process in session.processes():
        title = " ".join(process.cmdline())
        if title.startswith("ray::ServeReplica") and swap_graph.NAME in title:
            return process
    raise SystemExit("no replica is running")


def _resident(process: psutil.Process) -> float:
    """MiB that are its own, once what drains is gone."""
    time.sleep(4)
    return float(process.memory_info().rss) / 2**20
