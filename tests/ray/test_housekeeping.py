"""Ray's housekeeping goes behind what answers requests, and nothing else does."""

import os
from collections import defaultdict

import psutil
import pytest
from conftest import Served

from twinpath.online.environment import FAST_PATH, NICENESS
from twinpath.online.housekeeping import housekeeping, put_behind

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(240)]
BEHIND = (
    "ray::ServeController", "ray::ProxyActor", "ray::DashboardAgent", "ray::RuntimeEnvAgent",
    "dashboard.py", "log_monitor.py", "ray.util.client.server", "ray-dashboard-ServeHead",
)  # fmt: skip
BEFORE = ("raylet/raylet", "gcs_server", "ray::HAProxyManager", "ray::ServeReplica", "haproxy -db")


def niceness(process: psutil.Process) -> set[int]:
    """Of all its threads."""
    return {os.getpriority(os.PRIO_PROCESS, thread.id) for thread in process.threads()}


def test_housekeeping_is_nice_and_replicas_and_what_starts_them_are_not(served: Served):
    found: dict[str, set[int]] = defaultdict(set)
    for process in served.session.processes():
        line = " ".join(process.cmdline())
        for name in (*BEHIND, *BEFORE):
            if name in line and not (name in BEHIND and "raylet/raylet" in line):
                found[name] |= niceness(process)
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert {name: found[name] for name in BEFORE} == {name: {own} for name in BEFORE}
    nice = {int(FAST_PATH[NICENESS])}
    assert {name: found[name] for name in BEHIND} == dict.fromkeys(BEHIND, nice)


def test_no_replica_is_taken_for_housekeeping(served: Served):
    [raylet] = [p for p in served.session.processes() if p.name() == "raylet"]
    lines = [" ".join(process.cmdline()) for process in housekeeping(raylet)]
    assert len(lines) > len(BEHIND)
    assert not [line for line in lines if "ServeReplica" in line or "haproxy" in line.lower()]


def test_without_the_variable_and_outside_of_ray_all_stays_as_it_is():
    assert put_behind({NICENESS: "10"}) == []
    assert put_behind({}) == []
