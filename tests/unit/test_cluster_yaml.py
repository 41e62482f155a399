"""`cluster.yaml` is a file that Ray's own launcher accepts, and it says what we mean."""

import copy
import shlex
import sysconfig
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from twinpath.online.environment import FAST_PATH

ROOT = Path(__file__).resolve().parents[2]

launcher = pytest.importorskip("ray.autoscaler._private.util")


@pytest.fixture(scope="module")
def written() -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return config


@pytest.fixture
def config(written: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(written)


def prepare(config: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` does before it speaks to a cloud: fill in defaults, then check."""
    prepared: dict[str, Any] = launcher.prepare_config(config)
    launcher.validate_config(prepared)
    return prepared


def test_ray_accepts_the_file(config):
    prepared = prepare(config)
    assert prepared["cluster_name"] == "twinpath"
    assert prepared["head_node_type"] in prepared["available_node_types"]


def test_ray_fills_in_no_node_type_that_we_did_not_write(config, written):
    assert set(prepare(config)["available_node_types"]) == set(written["available_node_types"])


@pytest.mark.parametrize(
    "typo",
    [
        pytest.param(lambda c: c.update(max_worker=3), id="at the top"),
        pytest.param(
            lambda c: c["available_node_types"]["gpu_worker"].update(min_worker=1),
            id="in a node type",
        ),
        pytest.param(lambda c: c["docker"].update(imgae="x"), id="in docker"),
        pytest.param(
            lambda c: c["available_node_types"]["gpu_worker"]["resources"].update(GPU=0.5),
            id="a fraction of a GPU",
        ),
        pytest.param(
            lambda c: c["available_node_types"]["gpu_worker"].update(labels={"pool": 1}),
            id="a label that is no text",
        ),
    ],
)
def test_ray_refuses_a_typo(config, typo):
    typo(config)
    with pytest.raises(jsonschema.ValidationError):
        prepare(config)


def test_an_unknown_head_type_is_refused(config):
    config["head_node_type"] = "haed"
    with pytest.raises(ValueError, match="head_node_type"):
        prepare(config)


def test_workers_scale_between_bounds_and_gpus_from_zero(written):
    types = written["available_node_types"]
    workers = {name: kind for name, kind in types.items() if name != written["head_node_type"]}
    assert all(0 <= kind["min_workers"] < kind["max_workers"] for kind in workers.values())
    assert types["gpu_worker"]["min_workers"] == 0
    assert sum(kind["max_workers"] for kind in workers.values()) <= written["max_workers"]


def test_the_head_takes_no_replica(written):
    assert written["available_node_types"]["head"]["resources"]["CPU"] == 0


def test_a_gpu_placement_fits_only_the_gpu_nodes(written):
    """Ray has no taints: GPU nodes offer too little CPU for what is not meant for them."""
    types = written["available_node_types"]
    with_gpu = [name for name, kind in types.items() if kind["resources"].get("GPU", 0) > 0]
    assert with_gpu == ["gpu_worker"]
    assert types["gpu_worker"]["resources"]["CPU"] < types["cpu_worker"]["resources"]["CPU"]
    pools = [kind["labels"]["twinpath.io/pool"] for kind in types.values()]
    assert sorted(pools) == ["cpu", "gpu", "head"]


@pytest.mark.parametrize("which", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_serve_switches_are_in_the_environment_of_ray_start_on_every_node(written, which):
    start = next(command for command in written[which] if "ray start" in command)
    switches, _, _ = start.partition("ray start")
    for name, value in FAST_PATH.items():
        # A cluster has more cores, and may have balancers of its own in front.
        if name not in ("RAY_SERVE_HAPROXY_NBTHREAD", "RAY_USAGE_STATS_ENABLED") and (
            "DRAINING" not in name
        ):
            value = value.replace(sysconfig.get_path("scripts"), "/home/ray/twinpath/.venv/bin")
            assert f"{name}={value}" in shlex.split(switches)
    assert "RAY_SERVE_THROUGHPUT_OPTIMIZED=1" in switches


def test_the_image_has_the_ray_of_the_lock(written):
    lock = (ROOT / "requirements" / "lock.txt").read_text().splitlines()
    (ray,) = (line.partition("==")[2] for line in lock if line.startswith("ray=="))
    images = [written["docker"]["image"]] + [
        kind["docker"]["worker_image"]
        for kind in written["available_node_types"].values()
        if "docker" in kind
    ]
    assert all(image.partition(":")[2].startswith(f"{ray}-py311") for image in images)


def test_no_credential_is_in_the_file(written):
    text = (ROOT / "cluster.yaml").read_text().lower()
    for word in ("aws_access_key", "aws_secret", "password", "private_key", "token"):
        assert word not in text
