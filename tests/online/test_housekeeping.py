"""Ray's housekeeping goes behind what answers requests, and nothing else does."""

import contextlib
import os
from collections import defaultdict

import psutil
import pytest

from online.conftest import Served, until
from twinpath.online.environment import FAST_PATH, NICENESS
from twinpath.online.housekeeping import housekeeping, put_behind

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(240)]
BEHIND = (
    "ray::ServeController", "ray::ProxyActor", "ray::DashboardAgent", "ray::RuntimeEnvAgent",
    "dashboard.py", "log_monitor.py", "ray.util.client.server", "ray-dashboard-ServeHead",
)  # fmt: skip
BEFORE = ("raylet/raylet", "gcs_server", "ray::HAProxyManager", "ray::ServeReplica", "haproxy -db")
NICE = int(FAST_PATH[NICENESS])


def niceness(served: Served) -> dict[str, set[int]]:
    """Of all threads of the session's processes, by what they are."""
    found: dict[str, set[int]] = defaultdict(set)
    for process in served.session.processes():
        with contextlib.suppress(psutil.Error):
            line = " ".join(process.cmdline())
            names = BEFORE if "raylet/raylet" in line else (*BEHIND, *BEFORE)
            for name in names:
                for thread in process.threads() if name in line else ():
                    with contextlib.suppress(ProcessLookupError):
                        found[name].add(os.getpriority(os.PRIO_PROCESS, thread.id))
    return found


def test_housekeeping_is_nice_and_replicas_and_what_starts_them_are_not(served: Served):
    own = os.getpriority(os.PRIO_PROCESS, 0)
    if own >= NICE:
        pytest.skip(f"these tests are nicer themselves: {own}")
    wanted = {name: {NICE} for name in BEHIND} | {name: {own} for name in BEFORE}
    # A thread that begins at this moment has been missed, and a HAProxy may be another one soon.
    until(lambda: niceness(served) == wanted, 20, "housekeeping is nice, and nothing else")


def test_no_replica_is_taken_for_housekeeping(served: Served):
    [raylet] = [p for p in served.session.processes() if p.name() == "raylet"]
    found = [" ".join(process.cmdline()) for process in housekeeping(raylet)]
    assert len(found) > len(BEHIND)
    assert not [line for line in found if "ServeReplica" in line or "haproxy" in line.lower()]
    proxies = [line for line in found if "ray::ProxyActor" in line]
    others = [" ".join(process.cmdline()) for process in housekeeping(raylet, proxied=True)]
    assert len(proxies) == 1
    assert sorted(found) == sorted(others + proxies)


@pytest.mark.parametrize("given", [str(NICE), "0", "", "ten", "-5"])
def test_outside_of_ray_and_with_other_values_all_stays_as_it_is(given: str):
    assert put_behind({NICENESS: given}) == []
