"""The FeatureLookup node in a graph: its columns, what is missing, views on demand, marks."""

import asyncio
import pickle
import time
from dataclasses import replace
from datetime import datetime, timedelta

import numpy as np
import pytest
from pydantic import BaseModel

from tests.features.shop import NOW
from twinpath import FeatureLookup, Graph
from twinpath.errors import ConfigError, DeadlineError, FeatureStoreError, GraphError
from twinpath.features.repo import FeatureRepo
from twinpath.features.store import open_reader
from twinpath.graph.context import DEADLINE_S


class Visit(BaseModel):
    user_id: str | None = None
    shop: int = 0
    asked_at: datetime = NOW


class Spent(BaseModel):
    spent: float | None = None
    a_visit: float | None = None


def visits(repo, output=Spent, service="visits_only", **options) -> Graph:
    graph = Graph("visits", input=Visit, output=output)
    with graph as rows:
        graph.output(FeatureLookup(service, repo, as_of="asked_at", **options)(rows))
    return graph


def ask(graph: Graph, *rows: dict):
    try:
        return graph.run(list(rows))
    finally:
        graph.close()


def test_columns_are_declared_from_the_repository_when_the_graph_is_written(sqlite_repo):
    node = FeatureLookup("visits_only", str(sqlite_repo), as_of="asked_at")
    assert node.inputs == {"user_id": "str", "shop": "int64", "asked_at": "datetime64[us]"}
    assert node.outputs == {"spent": "float64", "a_visit": "float64"}


def test_a_copy_for_another_process_reads_no_repository_to_know_its_columns(
    sqlite_repo, monkeypatch
):
    node = FeatureLookup("visits_only", str(sqlite_repo))
    data = pickle.dumps(node)
    monkeypatch.setattr(FeatureLookup, "_declared", lambda self: pytest.fail("it was read"))
    copied = pickle.loads(data)
    assert (copied.inputs, copied.outputs) == (node.inputs, node.outputs)


def test_a_repository_that_is_not_there_yet_leaves_the_columns_undeclared(tmp_path):
    node = FeatureLookup("visits_only", str(tmp_path / "nothing"))
    assert node.outputs is None
    with pytest.raises(ConfigError, match=r"feature_store\.yaml"):
        node.setup()


def test_other_features_than_declared_are_refused_at_set_up(sqlite_repo):
    node = FeatureLookup(
        "visits_only", str(sqlite_repo), keys={"user_id": "str"}, features={"spent": "float32"}
    )
    with pytest.raises(ConfigError, match="3 differences"):
        node.setup()


def test_a_service_that_is_not_applied_is_named_with_what_there_is(sqlite_repo):
    node = FeatureLookup("visit_only", str(sqlite_repo))
    with pytest.raises(ConfigError, match="Did you mean 'visits_only'"):
        node.setup()


def test_a_view_on_demand_sees_the_features_that_were_read(sqlite_repo):
    answer = ask(visits(str(sqlite_repo)), {"user_id": "user-5", "shop": 1}, {"user_id": "nobody"})
    first, unknown = answer.rows()
    assert first["spent"] > 0
    assert first["a_visit"] == pytest.approx(0.25)
    assert unknown == {"spent": None, "a_visit": None}


def test_a_default_stands_where_nothing_is_known(sqlite_repo):
    graph = visits(str(sqlite_repo), defaults={"spent": -1.0})
    assert ask(graph, {"user_id": "nobody"}).rows()[0]["spent"] == -1.0


def test_a_default_for_no_feature_is_refused(sqlite_repo):
    with pytest.raises(ConfigError, match="Did you mean 'spent'"):
        ask(visits(str(sqlite_repo), defaults={"spend": 0.0}), {"user_id": "user-1"})


def test_a_row_without_features_fails_alone_when_told_to(sqlite_repo):
    graph = visits(str(sqlite_repo), on_missing="error")
    answer = ask(graph, {"user_id": "user-5", "shop": 1}, {"user_id": "nobody", "shop": 7})
    assert answer.rows()[0] is not None
    assert answer.rows()[1] is None
    assert "view 'visits' has no features that hold for user_id='nobody', shop=7" in (
        answer.errors[1].message
    )


class Counts(BaseModel):
    visits: float | None = None
    f32: float | None = None
    text: str | None = None


def test_null_makes_integers_floats(sqlite_repo):
    graph = visits(str(sqlite_repo), Counts, "all", on_missing="null")
    known, unknown = ask(graph, {"user_id": "user-2", "shop": 1}, {"user_id": "x"}).rows()
    assert known["visits"] == int(known["visits"])
    assert unknown == {"visits": None, "f32": None, "text": None}


def test_a_moment_long_after_the_last_value_finds_it_run_out(sqlite_repo):
    late = {"user_id": "user-5", "shop": 1, "asked_at": NOW + timedelta(days=3)}
    assert ask(visits(str(sqlite_repo)), late).rows()[0]["spent"] is None


def test_full_names_are_those_of_feast(sqlite_repo):
    node = FeatureLookup("visits_only", str(sqlite_repo), full_names=True)
    assert list(node.outputs) == ["visits__spent", "worth__a_visit"]


class Marked(Spent):
    features_missing: bool


def broken(repo, monkeypatch) -> None:
    async def refuse(*_):
        raise ConnectionRefusedError("nobody there")

    monkeypatch.setattr("twinpath.features.sqlite.SqliteReader.read", refuse)


def test_without_a_store_a_batch_fails_with_a_retry(sqlite_repo, monkeypatch):
    broken(sqlite_repo, monkeypatch)
    with pytest.raises(FeatureStoreError, match="nobody there") as failed:
        ask(visits(str(sqlite_repo)), {"user_id": "user-1"})
    assert failed.value.retry_after_s > 0


def test_without_a_store_answers_are_degraded_and_say_so_when_told_to(sqlite_repo, monkeypatch):
    broken(sqlite_repo, monkeypatch)
    graph = visits(
        str(sqlite_repo),
        Marked,
        on_failure="degrade",
        on_missing="error",
        degraded_column="features_missing",
    )
    answer = ask(graph, {"user_id": "user-5", "shop": 1}, {"user_id": "user-6"})
    assert answer.outcome.remarks == {"features": "degraded"}
    assert answer.rows()[0] == {"spent": None, "a_visit": None, "features_missing": True}
    assert not answer.errors


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"on_missing": "ignore"}, "on_missing='ignore'"),
        ({"on_failure": "panic"}, "on_failure='panic'"),
        ({"timeout_ms": 0}, "timeout_ms=0"),
        ({"max_staleness_s": -1}, "max_staleness_s=-1"),
        ({"keys": {"a": "str"}}, "both keys and features"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, words):
    with pytest.raises(GraphError, match=words):
        FeatureLookup("s", "nowhere", **options)


def test_a_batch_job_needs_the_rows_moments(sqlite_repo):
    node = FeatureLookup("visits_only", str(sqlite_repo))
    with pytest.raises(GraphError, match="as_of="):
        node.offline()
    assert node.offline("now") is node


def test_the_requests_deadline_and_the_nodes_own_limits_reach_the_read(sqlite_repo, monkeypatch):
    node = FeatureLookup("visits_only", str(sqlite_repo), timeout_ms=1234, max_staleness_s=5.0)
    node.setup()
    assert node._online._timeout_s == 1.234
    assert node._online._caches[0].ttl == 5.0
    given = {
        "user_id": np.array(["user-1"], dtype=object),
        "shop": np.array([0], dtype=np.int64),
    }

    async def story() -> None:
        DEADLINE_S.set(time.monotonic() - 1)
        with pytest.raises(DeadlineError):
            await node.predict(given)
        assert node.statistics.entities == 0
        DEADLINE_S.set(time.monotonic() + 60)
        await node.predict(given)
        assert node.statistics.entities == 1

    asyncio.run(story())
    node.teardown()


def test_values_that_were_read_serve_again_within_their_bound_and_no_longer(redis_repo):
    import asyncio

    from twinpath.features.online import OnlineFeatures
    from twinpath.features.repo import FeatureRepo

    repo = FeatureRepo(redis_repo)
    online = OnlineFeatures(repo, repo.service("visits_only"), timeout_s=30, max_staleness_s=0.5)
    given = {
        "user_id": np.array(["user-1", "user-2"], dtype=object),
        "shop": np.array([0, 1], dtype=np.int64),
    }

    async def story() -> list[int]:
        asked = []
        for pause_s in (0.0, 0.0, 0.7):
            await asyncio.sleep(pause_s)
            await online.read(given, None)
            asked.append(online.statistics.entities)
        await online.close()
        return asked

    first, second, third = asyncio.run(story())
    assert second in (first, first + 2)  # a machine that stands still for half a second reads again
    assert third > first
    assert online.statistics.cached_entities in (0, 2)


def test_the_registry_is_read_anew_beside_the_requests(tmp_path_factory):
    import time

    from tests.features.shop import make_repo
    from twinpath.features.repo import FeatureRepo

    folder = make_repo(tmp_path_factory.mktemp("watched") / "repo", "{type: sqlite, path: o.db}")
    repo = FeatureRepo(folder)
    assert repo.service("types_only").views[0].ttl_s == 12 * 3600
    repo.watch(every_s=0.05)
    try:
        store = FeatureRepo(folder).store
        view = store.get_feature_view("types")
        view.ttl = timedelta(hours=1)
        store.apply([view])
        end_s = time.monotonic() + 60
        while repo.service("types_only").views[0].ttl_s != 3600:
            assert time.monotonic() < end_s, "the change was not seen"
            time.sleep(0.02)
    finally:
        repo.close()


def test_other_keys_than_the_service_needs_are_refused_at_set_up(sqlite_repo):
    features = {"spent": "float64", "a_visit": "float64"}
    node = FeatureLookup("visits_only", str(sqlite_repo), keys={"user": "str"}, features=features)
    with pytest.raises(ConfigError, match="declares the keys user, and the service needs"):
        node.setup()


async def test_a_row_without_a_moment_is_captured_as_of_now(sqlite_repo):
    node = FeatureLookup("visits_only", str(sqlite_repo), as_of="asked_at")
    node.setup()
    seen = []
    node.watch = lambda columns, moments, made: seen.append(moments)
    before_us = time.time_ns() // 1000
    then = np.datetime64("2024-05-01T12:00:00", "us")
    await node.predict(
        {
            "user_id": np.array(["user-1", "user-2"], dtype=object),
            "shop": np.array([0, 0]),
            "asked_at": np.array([then, "NaT"], dtype="datetime64[us]"),
        }
    )
    assert seen[0][0] == then.astype(np.int64)
    assert before_us <= seen[0][1] <= time.time_ns() // 1000
    await asyncio.to_thread(node.teardown)


def test_a_pinned_version_is_refused_and_not_read_as_another(sqlite_repo):
    repo = FeatureRepo(sqlite_repo)
    [*views] = repo.service("visits_only").views
    with pytest.raises(ConfigError, match="pins 'visits@v2'"):
        open_reader(repo, [[replace(view, label="visits@v2") for view in views]], 1.0)
