"""The fast readers give what Feast's own client gives, from the same stores."""

import asyncio
import sqlite3
from datetime import timedelta

import numpy as np
import pytest

from tests.features.shop import NOW
from twinpath.features.online import OnlineFeatures
from twinpath.features.redis import Connection
from twinpath.features.repo import FeatureRepo
from twinpath.features.store import FeastReader, group_views
from twinpath.nodes.features import FeatureLookup

USERS = [f"user-{i}" for i in (*range(45), 3, 3, 0)]
SHOPS = [i % 4 - 1 for i in range(len(USERS))]
MOMENT = np.full(len(USERS), int(NOW.timestamp()) * 1_000_000)


def columns() -> dict[str, np.ndarray]:
    return {
        "user_id": np.array(USERS, dtype=object),
        "shop": np.array(SHOPS, dtype=np.int64),
    }


def read(online: OnlineFeatures, moments=None, given=None) -> dict[str, list]:
    """Every value as Python objects by column, None where nothing is known."""

    async def both():
        try:
            return await online.read(given or columns(), moments)
        finally:
            await online.close()

    found: dict[str, list] = {}
    for rows in asyncio.run(both()):
        for name in rows.view.features:
            values = rows.values[name].tolist()
            nulls = rows.nulls.get(name)
            found[name] = [
                None
                if not rows.found[i] or v is None or v != v or (nulls is not None and nulls[i])
                else v
                for i, v in enumerate(values)
            ]
    return found


def feast_answers(repo: FeatureRepo) -> dict[str, list]:
    rows = [{"user_id": u, "shop": s} for u, s in zip(USERS, SHOPS, strict=True)]
    service = repo.store.get_feature_service("all")
    answer = repo.store.get_online_features(service, rows).to_dict()
    return {name: [None if v != v else v for v in values] for name, values in answer.items()}


def without_zone(value):
    return value.replace(tzinfo=None) if getattr(value, "tzinfo", None) else value


@pytest.fixture(params=["sqlite", "redis"])
def repo(request) -> FeatureRepo:
    return FeatureRepo(request.getfixturevalue(f"{request.param}_repo"))


def opened(repo: FeatureRepo, **options) -> OnlineFeatures:
    return OnlineFeatures(repo, repo.service("all"), timeout_s=30, **options)


def no_ttl(online: OnlineFeatures, moments) -> np.ndarray:
    """A moment at which nothing has run out: Feast's client gives values of any age."""
    return moments - int(timedelta(hours=40).total_seconds()) * 1_000_000


def test_the_store_has_its_own_fast_reader(repo):
    kind = repo.store.config.online_store.type
    assert opened(repo).reader_name == {"sqlite": "SqliteReader", "redis": "RedisReader"}[kind]


def test_every_type_is_read_as_feast_reads_it(repo):
    online = opened(repo)
    found = read(online, no_ttl(online, MOMENT))
    feast = feast_answers(repo)
    for name in found:
        ours = [without_zone(v) for v in found[name]]
        theirs = [without_zone(v) for v in feast[name]]
        assert ours == theirs, name
    present = [name for name in found if any(v is not None for v in found[name])]
    assert len(present) == 10  # every one of the features has values at all


def test_a_view_on_demand_is_computed_as_feast_computes_it(repo):
    node = FeatureLookup("all", repo, as_of="asked_at", timeout_ms=30_000)
    node.setup()
    earlier = np.datetime64(NOW, "us") - np.timedelta64(40, "h")
    asked = columns() | {"asked_at": np.full(len(USERS), earlier)}
    found = asyncio.run(node.predict(asked))["a_visit"].tolist()
    feast = feast_answers(repo)["a_visit"]
    assert [None if value != value else value for value in found] == feast
    assert sum(value is not None for value in feast) > 10


def test_all_views_are_read_in_one_round_trip_or_one_statement_each(repo, monkeypatch):
    online = opened(repo)
    asked: list[int] = []
    ask = Connection.ask

    def counted(self, commands: bytes, replies: int, timeout_s: float):
        asked.append(replies)
        return ask(self, commands, replies, timeout_s)

    monkeypatch.setattr(Connection, "ask", counted)
    statements: list[str] = []
    if online.reader_name == "SqliteReader":
        connect = sqlite3.connect

        def traced(*args, **more):
            connection = connect(*args, **more)
            connection.set_trace_callback(statements.append)
            return connection

        monkeypatch.setattr(sqlite3, "connect", traced)
    read(online)
    # Distinct keys: 45 users, and as many pairs of a user and a shop, of which some come again.
    pairs = len(set(zip(USERS, SHOPS, strict=True)))
    if online.reader_name == "SqliteReader":
        assert len(statements) == len(repo.service("all").views) == 2
        assert asked == []
    else:
        assert asked == [len(set(USERS)) + pairs]


def test_feasts_own_reader_gives_the_same_columns(repo):
    online = opened(repo)
    fast = read(online, no_ttl(online, MOMENT))
    slow = opened(repo)
    slow._reader = FeastReader(repo, group_views(repo.service("all").views))
    for encoder in slow._encoders:
        encoder._suffix = b""
    assert read(slow, no_ttl(slow, MOMENT)) == fast


def test_a_value_over_its_time_to_live_is_missing_at_that_moment_and_not_before(repo):
    online = opened(repo)
    now = read(online, MOMENT)
    # User 5 has a single row, 30 hours old; the view's values hold for 12 hours.
    assert now["f64"][5] is None
    assert now["f64"][2] is not None
    assert online.statistics.expired > 0
    earlier = read(opened(repo), no_ttl(online, MOMENT))
    assert earlier["f64"][5] is not None


def test_a_null_key_reads_nothing_and_harms_no_neighbour(repo):
    given = {
        "user_id": np.array(["user-1", None, "user-2"], dtype=object),
        "shop": np.array([0, 0, 1], dtype=np.int64),
    }
    found = read(opened(repo), MOMENT[:3], given)
    assert found["f64"][0] is not None
    assert found["f64"][1] is None
    assert found["f64"][2] is not None


def test_each_distinct_key_is_read_once(repo):
    online = opened(repo)
    same = {"user_id": np.array(["user-1"] * 50, dtype=object), "shop": np.zeros(50, dtype=int)}
    found = read(online, MOMENT[:1].repeat(50), same)
    assert online.statistics.entities == 2  # one of each group of entities
    assert len(set(found["f64"])) == 1


def test_the_age_of_features_is_recorded(repo):
    online = opened(repo)
    read(online, MOMENT)
    assert 0 < online.statistics.age_mean_s < online.statistics.age_max_s
