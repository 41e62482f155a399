"""One Ray with Serve behind HAProxy for all of these tests, with the small graphs deployed."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from twinpath.online.gateway.keys import new_key, write_keys
from twinpath.online.session import ServeSession

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
GRAPHS = ("fused", "branched", "burst", "asleep", "broken", "shared")


class Served:
    """The session with the test graphs: graph ``g`` answers below ``/g``."""

    def __init__(self, session: ServeSession) -> None:
        self.session = session
        #: An API key for the application `guarded`.
        self.key = ""
        #: What is deployed now.
        self.applications: list[dict[str, Any]] = []
        self._auth = {"Authorization": f"Bearer {session.marker}"}

    def client(self, app: str) -> httpx.Client:
        """An HTTP client for the paths of one application."""
        return httpx.Client(base_url=f"{self.session.url}/{app}", timeout=60)

    def deploy(self, applications: list[dict[str, Any]]) -> None:
        """``serve deploy`` exactly these applications."""
        self.applications = applications
        config = self.session.folder / "config.yaml"
        config.write_text(yaml.safe_dump({"applications": applications}))
        self.session.command("serve", "deploy", str(config))

    def application(self, app: str) -> dict[str, Any]:
        """What the dashboard knows of an application: status, message, deployments."""
        url = f"{self.session.dashboard_url}/api/serve/applications/"
        document = httpx.get(url, headers=self._auth, timeout=30).raise_for_status().json()
        found: dict[str, Any] = document["applications"].get(app, {})
        return found

    def counted(self, app: str, route: str) -> int:
        """Requests that Serve's metrics count for a route of an application."""
        wanted = ("ray_serve_deployment_request_counter", f'"{app}"', f'"{route}"')
        counts = [line for line in self.metrics() if all(part in line for part in wanted)]
        return sum(int(float(line.rpartition(" ")[2])) for line in counts)

    def metrics(self) -> list[str]:
        """What Prometheus would read from the node."""
        found = self.session.folder / "prom_metrics_service_discovery.json"
        [target, *_] = json.loads(found.read_text())[0]["targets"]
        return (
            httpx.get(f"http://{target}/metrics", timeout=30).raise_for_status().text.splitlines()
        )

    def replicas(self, app: str, deployment: str) -> int:
        """How many replicas of a deployment are running."""
        found = self.application(app)["deployments"][deployment]["replicas"]
        return sum(replica["state"] == "RUNNING" for replica in found)


def until(condition: Callable[[], Any], timeout_s: float, what: str) -> None:
    """Wait for a condition; fails with ``what`` after ``timeout_s`` seconds."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"{what}: not in {timeout_s} s"
        time.sleep(0.2)


def application(graph: str, **args: Any) -> dict[str, Any]:
    """The config of one of the test graphs, with an ingress that asks for little."""
    return {
        "name": graph,
        "route_prefix": f"/{graph}",
        "import_path": f"graphs_for_tests:{graph}_app",
        "args": {"ingress": {"num_cpus": 0.1}} | args,
    }


@pytest.fixture(scope="package")
def served() -> Iterator[Served]:
    """All test graphs, deployed and ready; one more `fused` has a placed node by its config."""
    placed = application("fused", nodes={"double": {"num_cpus": 0.1}})
    placed |= {"name": "placed", "route_prefix": "/placed"}
    tight = application("tight", ingress={"num_cpus": 0.1, "max_queue_rows": 2})
    waiting = application(
        "waiting", ingress={"num_cpus": 0.1, "max_queue_rows": 100, "body_timeout_s": 3.0}
    )
    paths = [ROOT / "platform", ROOT, HERE]
    with ServeSession(num_cpus=8, pythonpath=paths) as session:
        served = Served(session)
        key, record = new_key("ann", ("fused",))
        served.key = key
        write_keys(session.folder / "keys", [record])
        gateway = {
            "api_keys": str(session.folder / "keys"),
            "limits": {"rate": "1000/second"},
            "audit_log": str(session.folder / "audit.jsonl"),
            "cors": {"allow_origins": ["https://me.example"]},
        }
        guarded = application("fused", gateway=gateway)
        guarded |= {"name": "guarded", "route_prefix": "/guarded"}
        pair = application("fused", ingress={"num_cpus": 0.1, "replicas": {"min": 2, "max": 2}})
        pair |= {"name": "pair", "route_prefix": "/pair"}
        served.deploy([*map(application, GRAPHS), placed, tight, waiting, guarded, pair])
        names = (*GRAPHS, "placed", "tight", "waiting", "guarded", "pair")
        session.wait_until_ready(*(f"/{name}/readyz" for name in names))
        yield served
    assert session.processes() == []
