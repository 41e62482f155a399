"""Whatever is lost in the middle of a rollout, serving goes on, and so does it, at its step."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import psutil
import pytest
from rolling import MODEL, Load, Rolling, register, until

from twinpath.errors import TwinpathError
from twinpath.registry.client import Registry
from twinpath.rollout.state import TAG, RolloutState

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


class Watched:
    """The states of a rollout as the registry had them, read ten times a second."""

    def __init__(self, rolling: Rolling) -> None:
        self._registry = Registry(rolling.mlflow.uri, timeout_s=5)
        self.states: list[RolloutState] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Watched":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(timeout=30)
        self._registry.close()

    @property
    def now(self) -> RolloutState | None:
        """The last state that was read."""
        return self.states[-1] if self.states else None

    def step(self, wanted: int, timeout_s: float = 120) -> RolloutState:
        """Wait for a step of the rollout that is watched."""
        until(lambda: self.now and self.now.step >= wanted, timeout_s, f"step {wanted}")
        assert self.now is not None
        return self.now

    def promoted(self, challenger: str, timeout_s: float = 240) -> None:
        """Wait for the end; the rollout must have gone through its steps once, in order."""
        until(lambda: self.now and not self.now.live, timeout_s, f"an end of {self.now}")
        assert self.now is not None
        assert (self.now.status, self.now.challenger) == ("promoted", challenger), self.now.reason
        assert len({state.id for state in self.states}) == 1
        steps = [state.step for state in self.states]
        assert steps == sorted(steps), "it never fell back"

    def _run(self) -> None:
        while not self._ended.wait(0.1):
            try:
                text = self._registry.tags(MODEL).get(TAG)
            except TwinpathError:
                continue
            state = RolloutState.from_tag(text) if text else None
            if state is not None and (not self.states or state != self.states[-1]):
                self.states.append(state)


@contextmanager
def rollout(rolling: Rolling, seed: int, **changes: Any) -> Iterator[tuple[str, Watched, Load]]:
    """A rollout of a good challenger under load; afterwards nothing may have failed."""
    challenger = register(rolling.mlflow.uri, seed=seed)
    until(lambda: rolling.admin("GET", "/rollouts").status_code == 200, 120, "the controller")
    rolling.start(challenger, **({"minimum_time_s": 8} | changes))
    with (
        Load(rolling.session.url, rolling.key) as load,
        Watched(rolling) as watched,
    ):
        yield challenger, watched, load
    assert load.failures == []
    lines = rolling.admin("GET", f"/rollouts/{MODEL}/history").json()["history"]
    events = [line["event"] for line in lines if line["challenger"] == challenger]
    assert events == ["started", "stepped", "stepped", "promote: decided", "promoted"]


def replicas(rolling: Rolling, deployment: str) -> list[psutil.Process]:
    """The processes of a deployment's replicas."""
    found = []
    for process in rolling.session.processes():
        try:
            if f"ServeReplica:delays:{deployment}" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_a_controller_and_a_replica_that_are_killed_change_nothing(rolling: Rolling):
    with rollout(rolling, seed=7) as (challenger, watched, load):
        before = watched.step(1)
        [controller] = replicas(rolling, "rollout-controller")
        controller.kill()
        replicas(rolling, "delays")[0].kill()
        load.killed()
        assert watched.now == before
        new = until(
            lambda: [p for p in replicas(rolling, "rollout-controller") if p != controller],
            120, "another controller",
        )  # fmt: skip
        assert len(new) == 1
        watched.promoted(challenger)
        until(lambda: len(replicas(rolling, "delays")) == 2, 120, "another replica")


def test_a_minute_without_the_registry_stops_the_rollout_and_nobody_else(rolling: Rolling):
    with rollout(rolling, seed=8) as (challenger, watched, load):
        before = watched.step(1)
        rolling.mlflow.stop()
        answered, began_s = load.answered, time.monotonic()

        def told() -> str:
            live = rolling.admin("GET", "/rollouts").json()["rollouts"]
            return str(live[0]["live"]["registry"]["problem"])

        until(lambda: "did not answer" in told() or "failed" in told(), 90, "it is said")
        ready = httpx.get(f"{rolling.session.url}/readyz", timeout=10)
        assert (ready.status_code, "registry" in ready.text) == (200, True), ready.text
        time.sleep(max(0.0, 60 - (time.monotonic() - began_s)))
        assert load.answered > answered + 50
        assert load.failures == []
        rolling.mlflow.start()
        until(lambda: len(load.seen()) == 2, 60, "both versions answer")
        watched.promoted(challenger)
        assert before in watched.states
        assert [s.step for s in watched.states if s.live and not s.ending][-2:] == [1, 2]


def test_a_node_that_is_lost_with_replica_and_controller_is_made_up_for(rolling: Rolling):
    with rollout(rolling, seed=9) as (challenger, watched, load):
        before = watched.step(1)
        raylet = psutil.Process(rolling.node)
        lost = [raylet, *raylet.children(recursive=True)]
        assert any("rollout-controller" in " ".join(p.cmdline()) for p in lost)
        assert any("delays:delays" in " ".join(p.cmdline()) for p in lost)
        for process in lost:
            try:
                os.kill(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        load.killed()
        assert watched.now == before
        rolling.node = rolling.session.add_node(4, {"control": 1.0})
        watched.promoted(challenger)
        until(lambda: len(replicas(rolling, "delays")) == 2, 120, "another replica")
