"""What the tests of rollouts on Serve share: a real MLflow server, models, load, a served graph."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import yaml
from mlflow_server import MlflowServer
from rollout_graphs import CARRIERS

from twinpath.online.gateway.keys import new_key, write_keys
from twinpath.online.session import ServeSession

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
MODEL = "delay"
#: Steps short enough for a test, with enough rows for evidence.
STEPS: dict[str, Any] = {
    "steps": [0.1, 0.5, 1.0], "minimum_samples": 300, "minimum_time_s": 2, "segments": ["carrier"],
    # Two cores that run everything: how long calls take says nothing here.
    "thresholds": {"latency_ratio": 1000.0},
}  # fmt: skip


def until(condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """Wait for a condition and give what it gave; fails with ``what``."""
    deadline_s = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline_s, f"{what}: not in {timeout_s} s"
        time.sleep(0.2)
    return found


def rows(n: int, seed: int) -> dict[str, np.ndarray]:
    """Flights: shares of carriers are as in life, with one of 5 %."""
    random = np.random.default_rng(seed)
    return {
        "carrier_code": random.choice(len(CARRIERS), n, p=[0.2, 0.2, 0.2, 0.2, 0.15, 0.05]).astype(
            np.float64
        ),
        "hour": random.uniform(5, 23, n),
        "distance": random.uniform(100, 2500, n),
    }


def truth(x: Mapping[str, np.ndarray], seed: int) -> np.ndarray:
    """Whether flights are late: later in the day, more often."""
    chance = 1 / (1 + np.exp(-((x["hour"] - 17) / 3 + (x["carrier_code"] - 2) / 4)))
    return (np.random.default_rng(seed).random(len(chance)) < chance).astype(int)


def classifier(seed: int) -> Any:
    """A model that each seed trains on a slightly different part of the rows."""
    import xgboost

    return xgboost.XGBClassifier(
        n_estimators=40, max_depth=3, learning_rate=0.2, min_child_weight=20, subsample=0.9,
        random_state=seed, n_jobs=1,
    )  # fmt: skip


def register(uri: str, *, seed: int = 0, wrong_for: int | None = None, broken: bool = False) -> str:
    """Train and register a version of the model; its number. ``wrong_for``: a carrier whose
    flights it takes for the contrary; ``broken``: it wants a column that there is not."""
    import mlflow
    import pandas as pd

    # The same past for all: versions that are as good as each other score alike.
    x = rows(20_000, 0)
    y = truth(x, 1)
    if wrong_for is not None:
        y = np.where(x["carrier_code"] == wrong_for, x["hour"] < 14, y)
    frame = pd.DataFrame(x)
    if broken:
        frame = frame.rename(columns={"distance": "gate_number"})
    model = classifier(seed).fit(frame, y)
    mlflow.set_tracking_uri(uri)
    with mlflow.start_run():
        info = mlflow.xgboost.log_model(
            model, name="model", registered_model_name=MODEL, model_format="json",
            signature=mlflow.models.infer_signature(frame, model.predict_proba(frame)[:, 1]),
        )  # fmt: skip
    return str(info.registered_model_version)


class Load:
    """Clients in threads that ask without a pause; what failed, and what versions answered."""

    def __init__(self, url: str, key: str, clients: int = 2, batch: int = 32) -> None:
        self._url, self._headers, self._batch = url, {"x-api-key": key}, batch
        self.failures: list[str] = []
        self.versions: Counter[str] = Counter()
        self.answered = 0
        #: Requests that a killed replica may have had are those that began before this time.
        self.forgiven_until_s = 0.0
        self.forgiven: list[str] = []
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._run, args=(seed,), daemon=True) for seed in range(clients)
        ]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(timeout=60)

    def seen(self) -> Counter[str]:
        """The versions that answered since the last call, by rows."""
        with self._lock:
            found, self.versions = self.versions, Counter()
        return found

    def _run(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        with httpx.Client(timeout=60, headers=self._headers) as client:
            while not self._ended.is_set():
                x = rows(self._batch, int(random.integers(1 << 30)))
                body = [
                    {"carrier": CARRIERS[int(c)], "hour": h, "distance": d}
                    for c, h, d in zip(*(x[name].tolist() for name in x), strict=True)
                ]
                self._ask(client, body)
                self._ended.wait(0.02)

    def killed(self) -> None:
        """A replica was just killed: what it held may fail, what comes a second later may not."""
        self.forgiven_until_s = time.monotonic() + 1.0

    def _ask(self, client: httpx.Client, body: list[dict[str, Any]]) -> None:
        asked_s = time.monotonic()
        try:
            answer = client.post(f"{self._url}/delays/predict", json={"rows": body})
        except httpx.HTTPError as error:
            self._failed(repr(error), asked_s)
            return
        if answer.status_code != 200:
            self._failed(f"{answer.status_code} {answer.text[:300]}", asked_s)
            return
        with self._lock:
            self.answered += 1
            self.versions.update(row["model_version"] for row in answer.json()["rows"])

    def _failed(self, text: str, asked_s: float) -> None:
        # Said when it was asked, so that a failure can be laid beside what happened then.
        kept = self.forgiven if asked_s < self.forgiven_until_s else self.failures
        kept.append(f"{time.strftime('%H:%M:%S')} after {time.monotonic() - asked_s:.1f} s: {text}")


class Rolling:
    """The graph, served with keys, and its admin API."""

    def __init__(self, session: ServeSession, mlflow: MlflowServer, folder: Path) -> None:
        self.session, self.mlflow, self.folder = session, mlflow, folder
        self.key, user = new_key("ann")
        self.admin_key, root = new_key("root", admin=True)
        write_keys(folder / "keys.jsonl", [user, root])
        self.audit_log = folder / "rollouts.jsonl"
        #: The pid of the raylet of a second node, if there is one.
        self.node = 0

    def deploy(self, replicas: int = 2, **more: Any) -> None:
        """Deploy and wait until it answers."""
        application = {
            "name": "delays",
            "route_prefix": "/",
            "import_path": "rollout_graphs:app",
            "args": {
                "ingress": {
                    "num_cpus": 0.1,
                    "replicas": {"min": replicas, "max": replicas},
                },
                "gateway": {"api_keys": str(self.folder / "keys.jsonl")},
                "rollouts": {"audit_log": str(self.audit_log)},
            },
        }
        config = self.folder / "serve.yaml"
        config.write_text(yaml.safe_dump({"applications": [application | more]}))
        self.session.deploy(config, timeout_s=400)
        self.session.wait_until_ready(timeout_s=240)

    def admin(self, method: str, path: str, key: str | None = None, **kw: Any) -> httpx.Response:
        """A request to the admin API."""
        headers = {"x-api-key": key or self.admin_key}
        with httpx.Client(base_url=f"{self.session.url}/admin", timeout=90) as client:
            return client.request(method, path, headers=headers, **kw)

    def start(self, challenger: str, **changes: Any) -> dict[str, Any]:
        """Start a rollout; its state."""
        asked = STEPS | {"challenger": challenger} | changes
        answer = self.admin("POST", f"/rollouts/{MODEL}", json=asked)
        assert answer.status_code == 201, answer.text
        found: dict[str, Any] = answer.json()["rollout"]
        return found

    def status(self) -> dict[str, Any]:
        """The rollout as the admin API shows it; {} while the controller cannot be asked."""
        answer = self.admin("GET", f"/rollouts/{MODEL}")
        return answer.json() if answer.status_code == 200 else {}

    def rollout(self) -> dict[str, Any]:
        """The state of the rollout."""
        return self.status().get("rollout") or {}

    def ended(self, timeout_s: float = 300) -> dict[str, Any]:
        """Wait until the rollout is over."""
        until(lambda: self.rollout().get("live") is False, timeout_s, f"an end of {self.status()}")
        return self.rollout()


def session_env(mlflow: MlflowServer, folder: Path) -> dict[str, str]:
    """What replicas need to find the registry and to keep its files apart from other tests'."""
    return {
        "MLFLOW_TRACKING_URI": mlflow.uri,
        "TWINPATH_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
    }
