"""Batch jobs with a feature lookup on Ray Data: as of then, as of now, and written back."""

import json
import os
import time
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pydantic import BaseModel

from tests.features.conftest import Redis
from tests.features.shop import NOW, make_repo
from tests.features.test_history import asked, read, repository
from twinpath import FeatureLookup, FeatureSink, Graph, Node
from twinpath.errors import BatchJobError, ConfigError
from twinpath.features.history import Sources, as_of_join
from twinpath.features.materialise import materialise
from twinpath.features.repo import FeatureRepo

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


@pytest.fixture(scope="module", autouse=True)
def ray():
    import ray

    here = Path(__file__).parent
    path = os.pathsep.join([str(ROOT / "platform"), str(ROOT), str(here)])
    ray.init(
        address="local", num_cpus=8, include_dashboard=False, log_to_driver=False,
        logging_level="error",
        runtime_env={"env_vars": {"PYTHONPATH": path, "FEAST_USAGE": "False"}},
    )  # fmt: skip
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def repo(tmp_path_factory) -> FeatureRepo:
    repo = repository(tmp_path_factory.mktemp("jobs") / "shop")
    materialise(repo, start=NOW - timedelta(days=3), end=NOW)
    return repo


class Question(BaseModel):
    user_id: str
    shop: int
    asked_at: datetime


class Answer(BaseModel):
    spent: float | None = None
    a_visit: float | None = None
    visits: int = 0


class Again(Node):
    """A score out of the features, to be written back."""

    inputs = {"spent": "float64"}
    outputs = {"visits": "int64"}

    def predict(self, columns):
        return {"visits": np.nan_to_num(columns["spent"] * 4).astype(np.int64) + 100}


@pytest.fixture(scope="module")
def graph(repo) -> Graph:
    graph = Graph("shop", input=Question, output=Answer)
    with graph as rows:
        found = FeatureLookup("visits_only", str(repo.given), as_of="asked_at", timeout_ms=60_000)(
            rows
        )
        graph.output(found, Again()(found))
    return graph


def source(n: int = 400) -> pd.DataFrame:
    keys, moments = asked(n)
    return pd.DataFrame(
        {**keys, "asked_at": moments.astype("datetime64[us]"), "number": np.arange(n)}
    )


def test_a_job_joins_what_held_at_each_rows_moment_and_writes_features_back(graph, repo, tmp_path):
    frame = source()
    job = graph.job(
        frame, tmp_path / "scored", keep=["user_id", "shop", "number"], workers=2, batch_size=64,
        push_to="visits",
    )  # fmt: skip
    done = job.run()
    assert (done.rows, done.dead_letters, done.pushed) == (400, 0, 400)
    files = sorted((tmp_path / "scored").glob("**/*.parquet"))
    scored = pd.concat([pd.read_parquet(file) for file in files])
    assert sorted(scored["number"]) == list(range(400))
    scored = scored.sort_values("number")
    keys, moments = asked(400)
    [view] = repo.service("visits_only").views
    joined = as_of_join(view, keys, moments, Sources())
    held = np.where(joined.found, joined.values["spent"], np.nan)
    np.testing.assert_array_equal(scored["spent"].to_numpy(dtype=float), held)
    assert 0 < joined.found.sum() < 400
    # A key that is in the job once is read back as the job wrote it.
    once = scored.drop_duplicates(["user_id", "shop"], keep=False).head(20)
    found = read(repo, "visits", {"user_id": once["user_id"].tolist(),
                                  "shop": once["shop"].tolist()})  # fmt: skip
    assert len(once) > 5
    assert found["visits"] == once["visits"].tolist()
    # And they outlive a materialisation of older rows.
    materialise(repo, start=NOW - timedelta(days=3), end=NOW, views=["visits"])
    again = read(repo, "visits", {"user_id": once["user_id"].tolist(),
                                  "shop": once["shop"].tolist()})  # fmt: skip
    assert again == found


def test_a_job_that_asks_for_now_reads_what_is_served(graph, tmp_path):
    frame = source(100).assign(asked_at=np.datetime64(NOW, "us"))
    now = graph.job(frame, keep=["number"], workers=1, features="now").dataset().to_pandas()
    local = graph.run(frame[["user_id", "shop", "asked_at"]])
    assert now["number"].tolist() == list(range(100))
    np.testing.assert_array_equal(
        now["spent"].to_numpy(dtype=float), local.columns["spent"].astype(float)
    )
    graph.close()


def test_rows_that_cannot_become_features_are_refused_before_anything_runs(graph, repo, tmp_path):
    with pytest.raises(ConfigError, match=r"needs 'user_id'.*keep="):
        graph.job(source(10), tmp_path / "a", push_to="visits").run()
    assert not (tmp_path / "a").exists()
    plain = Graph("plain", input=Question, output=Answer)
    with plain as rows:
        plain.output(rows)
    with pytest.raises(BatchJobError, match="no FeatureLookup"):
        plain.job(source(10), tmp_path / "a", push_to="visits")
    sink = FeatureSink("visits", repo)
    assert plain.job(source(10), tmp_path / "a", push_to=sink).push_to is sink


def test_served_graphs_read_what_was_pushed_and_their_captures_have_no_skew(tmp_path):
    import httpx
    from ray import serve
    from typer.testing import CliRunner

    from twinpath.cli import app
    from twinpath.online.session import free_ports

    repo = repository(tmp_path / "shop")
    node = FeatureLookup("visits_only", str(tmp_path / "shop"), as_of="asked_at", timeout_ms=60_000)
    args = {
        "features": {
            "capture": {"folder": str(tmp_path / "captured")},
            "push": {"callers": "anyone", "max_wait_s": 60},
        }
    }
    [port] = free_ports(1)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    row = {"user_id": "new", "shop": 1, "visits": 4, "spent": 10.0,
           "event_timestamp": NOW.isoformat()}  # fmt: skip
    question = {"user_id": "new", "shop": 1, "asked_at": NOW.isoformat()}
    try:
        # In the ingress, and in a replica of its own.
        for name, made in (("fused", node), ("placed", node.on(num_cpus=0.1))):
            graph = Graph(name, input=Question, output=Spent)
            with graph as rows:
                graph.output(made(rows))
            serve.run(graph.app(args), name=name, route_prefix=f"/{name}")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            body = {"view": "visits", "rows": [row], "wait": True}
            answer = client.post("/fused/features/push", json=body)
            assert (answer.status_code, answer.json()) == (200, {"accepted": 1, "written": 1})
            for name in ("fused", "placed"):
                answer = client.post(f"/{name}/predict", json={"rows": [question]})
                assert answer.json()["rows"] == [{"spent": 10.0, "a_visit": 2.5}]
    finally:
        serve.shutdown()
    # The history learns of it as well, as docs/features-offline.md says it should.
    source = tmp_path / "shop" / "visits.parquet"
    seen = pd.DataFrame([row]).assign(event_timestamp=NOW)
    seen = seen.astype({"event_timestamp": "datetime64[us]"})
    pd.concat([pd.read_parquet(source), seen]).to_parquet(source)
    for name in ("fused", "placed"):
        captured = tmp_path / "captured" / name / "feature_lookup"
        until(lambda folder=captured: list(folder.glob("*.parquet")))
        result = CliRunner().invoke(app, ["features", "skew", str(captured), "--json"])
        assert result.exit_code == 0, (result.output, result.exception)
        assert json.loads(result.stdout)["rows"] == 1
    assert repo.given == tmp_path / "shop"


def test_a_served_answer_says_that_its_features_are_degraded_wherever_they_were_looked_up(
    tmp_path,
):
    import httpx
    from ray import serve

    from twinpath.online.session import free_ports

    redis = Redis(tmp_path)
    redis.start()
    store = f'{{type: redis, connection_string: "{redis.address}"}}'
    folder = str(make_repo(tmp_path / "shop", store))
    node = FeatureLookup(
        "visits_only",
        folder,
        as_of="asked_at",
        on_failure="degrade",
        defaults={"spent": -1.0},
        timeout_ms=5000,
    )
    [port] = free_ports(1)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    question = {"user_id": "user-1", "shop": 0, "asked_at": NOW.isoformat()}
    try:
        for name, made in (("near", node), ("far", node.on(num_cpus=0.1))):
            graph = Graph(name, input=Question, output=Spent)
            with graph as rows:
                graph.output(made(rows))
            serve.run(graph.app(), name=name, route_prefix=f"/{name}")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:

            def answers():
                for name in ("near", "far"):
                    yield client.post(f"/{name}/predict", json={"rows": [question]})

            for answer in answers():
                assert answer.status_code == 200, answer.text
                assert "x-features" not in answer.headers
                assert answer.json()["rows"][0]["spent"] >= 0
            redis.kill()
            for answer in answers():
                assert answer.status_code == 200, answer.text
                assert answer.headers["x-features"] == "degraded"
                assert answer.json()["rows"][0]["spent"] == -1.0
    finally:
        serve.shutdown()
        redis.kill()


class Spent(BaseModel):
    spent: float | None = None
    a_visit: float | None = None


def until(condition) -> None:
    end_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.05)
