"""Ray's own commands work on a graph unmodified, and refuse a typo in its arguments."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import yaml

from online.conftest import Served, application, until
from twinpath.errors import TwinpathError

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(180)]


@contextmanager
def serve_run(served: Served, *args: str) -> Iterator[Path]:
    """``serve run`` in the background; it is killed, so that what else is served stays."""
    log = served.session.folder / "run.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("serve")), "run", *args],
            env=served.session.env, stdout=sink, stderr=subprocess.STDOUT,
            cwd=served.session.folder,
        )  # fmt: skip
    try:
        yield log
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


def answered(url: str) -> bool:
    try:
        return httpx.post(url, json={"rows": [{"x": 3}]}, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def test_serve_run_takes_the_import_path(served: Served):
    name = ("--name", "ran", "--route-prefix", "/ran")
    url = f"{served.session.url}/ran/fused/predict"
    with serve_run(served, *name, "graphs_for_tests:fused_app") as log:
        until(lambda: answered(url), 60, f"an answer; see {log}: {log.read_text()}")


def test_serve_build_describes_the_application_that_the_builder_makes(served: Served):
    # Ray builds applications only; builders, which alone take args, are for run and deploy.
    output = served.session.command("serve", "build", "graphs_for_tests:branched_built")
    [built] = yaml.safe_load("proxy_location" + output.partition("proxy_location")[2])[
        "applications"
    ]
    assert built["import_path"] == "graphs_for_tests:branched_built"
    assert {deployment["name"] for deployment in built["deployments"]} == {"branched", "large"}


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("ingres=1", "Did you mean 'ingress'?"),
        ("whatever=1", "Known: 'features', 'gateway', 'ingress', 'nodes', 'rollouts', 'version'"),
    ],
)
def test_an_unknown_argument_is_refused_with_what_was_meant(
    served: Served, argument: str, says: str
):
    with pytest.raises(TwinpathError) as refused:
        served.session.command("serve", "run", "graphs_for_tests:fused_app", argument)
    assert says in str(refused.value)


def test_an_unknown_node_in_a_config_is_refused_with_what_was_meant(served: Served):
    wrong = application("fused", nodes={"duoble": {"num_cpus": 0.1}})
    before = served.applications
    served.deploy([*before, wrong | {"name": "wrong", "route_prefix": "/wrong"}])
    try:
        until(
            lambda: "Did you mean 'double'?" in served.application("wrong").get("message", ""),
            60,
            "the refusal",
        )
    finally:
        served.deploy(before)
