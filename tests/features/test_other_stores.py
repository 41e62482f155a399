"""Stores without a fast reader are reached through Feast, by its configuration alone."""

import asyncio
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from feast.infra.online_stores.redis import RedisOnlineStoreConfig

from tests.features.conftest import Redis
from tests.features.shop import NOW, make_repo
from tests.features.test_online_read import USERS, feast_answers, without_zone
from twinpath.features.redis import address_of
from twinpath.features.repo import FeatureRepo
from twinpath.nodes.features import FeatureLookup
from twinpath.online.session import free_ports


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Redis]:
    """A Redis Cluster of one server that has all slots."""
    [bus] = free_ports(1)  # its own choice, the port plus 10,000, may be no port at all
    options = ("--cluster-enabled", "yes", "--cluster-port", str(bus))
    server = Redis(tmp_path_factory.mktemp("cluster"), options)
    server.start()
    client = [shutil.which("redis-cli"), "-p", str(server.port)]
    subprocess.run([*client, "cluster", "addslotsrange", "0", "16383"], check=True)
    end_s = time.monotonic() + 60
    while "cluster_state:ok" not in subprocess.check_output([*client, "cluster", "info"]).decode():
        assert time.monotonic() < end_s, "the cluster did not form"
        time.sleep(0.05)
    yield server
    server.kill()


def test_a_redis_cluster_is_read_through_feast(cluster, tmp_path: Path):
    folder = make_repo(
        tmp_path / "repo",
        f'{{type: redis, redis_type: redis_cluster, connection_string: "{cluster.address}"}}',
    )
    repo = FeatureRepo(folder)
    node = FeatureLookup("types_only", str(folder), timeout_ms=30_000, as_of="asked_at")
    node.setup()
    assert node._online.reader_name == "FeastReader"
    held = [int(user[5:]) % 5 != 0 for user in USERS]  # the values of the others have run out
    users = [user for user, holds in zip(USERS, held, strict=True) if holds]
    asked = {"user_id": np.array(users, dtype=object), "asked_at": moments(len(users))}
    found = asyncio.run(node.predict(asked))
    feast = feast_answers(repo)
    for name in ("f32", "f64", "text", "blob"):
        ours = [None if value != value else value for value in found[name].tolist()]
        theirs = [without_zone(v) for v, holds in zip(feast[name], held, strict=True) if holds]
        assert ours == theirs, name
    assert sum(value is not None for value in found["text"]) > 10
    node.teardown()


def moments(n: int) -> np.ndarray:
    return np.full(n, np.datetime64(NOW, "us"))


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ({"connection_string": "here:7000"}, ("here", 7000)),
        ({"connection_string": "here:7000,db=3,ssl=true"}, ("here", 7000)),
        ({"connection_string": "a:1,b:2", "redis_type": "redis_cluster"}, None),
        (
            {"connection_string": "a:1", "redis_type": "redis_sentinel", "sentinel_master": "m"},
            None,
        ),
        ({"connection_string": "a:1,b:2"}, None),
        ({"connection_string": "here:7000,socket_read_size=5"}, None),
    ],
)
def test_only_a_single_plain_server_is_read_directly(given, address):
    found = address_of(RedisOnlineStoreConfig(**given))
    assert (found and (found.host, found.port)) == address
