"""Rollouts on a real Serve and a real MLflow server, under load, without one failed request."""

import json
import time
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from rolling import MODEL, Load, Rolling, register, until
from typer.testing import CliRunner, Result

from twinpath.cli import app
from twinpath.errors import ForbiddenError, RolloutError

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def load(rolling: Rolling) -> Iterator[Load]:
    with Load(rolling.session.url, rolling.key) as found:
        yield found


def serving(rolling: Rolling) -> set[str]:
    """The versions that replicas have for what serves; empty while one has not reported."""
    replicas = rolling.status().get("replicas", [])
    return {str(replica["serving"]) for replica in replicas} if len(replicas) >= 2 else set()


def test_the_admin_api_is_for_keys_with_that_scope(rolling: Rolling):
    assert httpx.get(f"{rolling.session.url}/admin/rollouts").status_code == 401
    refused = rolling.admin("GET", "/rollouts", key=rolling.key)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden")
    until(lambda: rolling.admin("GET", "/rollouts").status_code == 200, 60, "the controller")
    shown = rolling.admin("GET", f"/rollouts/{MODEL}").json()
    assert (shown["aliases"], shown["rollout"]) == ({"champion": "1"}, None)
    unknown = rolling.admin("GET", "/rollouts/dealy")
    assert (unknown.status_code, "'delay'" in unknown.text) == (404, True)
    until(lambda: serving(rolling) == {"1"}, 60, "both replicas report")


def test_a_good_challenger_is_promoted_by_itself(rolling: Rolling, load: Load):
    challenger = register(rolling.mlflow.uri, seed=2)
    rolling.start(challenger)
    end = rolling.ended()
    assert end["status"] == "promoted", end
    until(lambda: serving(rolling) == {challenger}, 60, "every replica follows")
    load.seen()
    time.sleep(1)
    assert set(load.seen()) == {challenger}
    assert load.failures == []
    lines = rolling.admin("GET", f"/rollouts/{MODEL}/history").json()["history"]
    events = [line["event"] for line in lines if line["challenger"] == challenger]
    assert events == ["started", "stepped", "stepped", "promote: decided", "promoted"]
    logged = [json.loads(line) for line in rolling.audit_log.read_text().splitlines()]
    assert [line["id"] for line in logged if line["challenger"] == challenger] == [
        line["id"] for line in lines if line["challenger"] == challenger
    ]


def test_one_that_is_wrong_for_one_carrier_is_rolled_back(rolling: Rolling, load: Load):
    before = rolling.status()["aliases"]["champion"]
    challenger = register(rolling.mlflow.uri, seed=3, wrong_for=5)
    rolling.start(challenger, steps=[0.5, 1.0])
    end = rolling.ended()
    assert (end["status"], "carrier=WN" in end["reason"]) == ("rolled_back", True), end
    until(lambda: serving(rolling) == {before}, 60, "every replica goes back")
    time.sleep(3)
    load.seen()
    time.sleep(1)
    assert set(load.seen()) == {before}
    assert load.failures == []
    shown = {v["version"]: v for v in rolling.status()["versions"]}
    assert "carrier=WN" in shown[challenger]["refused"]
    again = rolling.admin("POST", f"/rollouts/{MODEL}", json={"challenger": challenger})
    assert (again.status_code, "was refused" in again.text) == (409, True)


def test_a_broken_version_is_named_and_never_serves(rolling: Rolling, load: Load):
    load.seen()
    challenger = register(rolling.mlflow.uri, seed=4, broken=True)
    rolling.start(challenger, steps=[0.5, 1.0])
    end = rolling.ended()
    assert (end["status"], "gate_number" in end["reason"]) == ("rolled_back", True), end
    assert challenger not in load.seen()
    assert load.failures == []
    shown = {v["version"]: v for v in rolling.status()["versions"]}
    assert "gate_number" in shown[challenger]["refused"]


def test_labels_that_come_later_roll_back_a_challenger_that_is_wrong(rolling: Rolling, load: Load):
    challenger = register(rolling.mlflow.uri, seed=5)
    rolling.start(
        challenger, kind="ab", steps=[0.5],
        thresholds={"latency_ratio": 1000.0, "accuracy": 0.1, "auc": 0.1},
    )  # fmt: skip
    url = rolling.session.url
    headers = {"x-api-key": rolling.key}
    random = np.random.default_rng(0)
    over: list[bool] = []
    with httpx.Client(base_url=url, timeout=60, headers=headers) as client:
        for number in range(600):
            rows = [
                {"carrier": "DL", "hour": float(h), "distance": 500.0 + number}
                for h in random.uniform(5, 23, 32)
            ]
            answer = client.post("/delays/predict", json={"rows": rows})
            assert answer.status_code == 200
            right = [row["score"] >= 0.5 for row in answer.json()["rows"]]
            # What the challenger says turns out to be chance.
            labels = [
                int(r) if row["model_version"] != challenger else int(random.integers(2))
                for r, row in zip(right, answer.json()["rows"], strict=True)
            ]
            given = {"request_id": answer.headers["x-request-id"], "labels": labels}
            first = client.post("/feedback", json=given)
            assert first.status_code == 200, first.text
            assert first.json()["joined"] == {"model": 32}
            if number == 0:
                twice = client.post("/feedback", json=given).json()
                assert (twice["joined"], twice["already_given"]) == ({}, True)
                lost = client.post("/feedback", json=given | {"request_id": "nobody"})
                assert (lost.status_code, lost.json()["error"]["code"]) == (404, "unknown_request")
                few = client.post("/feedback", json=given | {"labels": [1]})
                assert few.status_code == 422
            if number % 50 == 49:
                over.append(rolling.rollout().get("live") is False)
                if over[-1]:
                    break
    end = rolling.ended(60)
    assert end["status"] == "rolled_back", end
    assert any(word in end["reason"] for word in ("accuracy", "auc", "calibration")), end
    assert load.failures == []


def test_an_operator_pauses_resumes_and_aborts(rolling: Rolling, load: Load):
    challenger = register(rolling.mlflow.uri, seed=6)

    def command(*words: str, key: str = rolling.admin_key) -> Result:
        env = {"TWINPATH_URL": rolling.session.url, "TWINPATH_API_KEY": key}
        return CliRunner().invoke(app, ["rollout", *words], env=env)

    refused = command("start", MODEL, challenger, key=rolling.key)
    assert isinstance(refused.exception, ForbiddenError)
    started = command("start", MODEL, challenger, "--steps", "0.1,1", "--minimum-time", "3600")
    assert f"→ {challenger}" in started.output, started.output
    again = command("start", MODEL, challenger)
    assert isinstance(again.exception, RolloutError)
    assert "under way" in str(again.exception)
    paused = json.loads(command("pause", MODEL, "--reason", "lunch", "--json").stdout)
    assert paused["rollout"]["status"] == "paused"
    assert rolling.admin("POST", f"/rollouts/{MODEL}/resume").json()["rollout"]["live"]
    assert "running" in command("status", MODEL).output
    until(lambda: challenger in load.seen(), 60, "the challenger answers its share")
    done = rolling.admin("POST", f"/rollouts/{MODEL}/abort", json={"reason": "enough"})
    assert done.json()["rollout"]["status"] == "aborted"
    assert "lunch" in command("history", MODEL).output
    late = rolling.admin("POST", f"/rollouts/{MODEL}/pause")
    assert (late.status_code, late.json()["error"]["code"]) == (409, "rollout")
    time.sleep(3)
    load.seen()
    time.sleep(1)
    assert challenger not in load.seen()
    lines = rolling.admin("GET", f"/rollouts/{MODEL}/history").json()["history"]
    mine = [(line["event"], line["by"]) for line in lines if line["challenger"] == challenger]
    assert [event for event, _ in mine] == [
        "started", "paused", "resumed", "abort: decided", "aborted",
    ]  # fmt: skip
    assert {by for _, by in mine} == {"root"}
    assert load.failures == []
