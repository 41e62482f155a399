"""Which version scores which row: the rollout's split, pins, a challenger that fails, copies."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from registered_models import Shelf, columns, constant, skops

from twinpath import RegistryModel
from twinpath.graph.columns import NOTE, PIN
from twinpath.registry.reference import ROLLOUT_TAG
from twinpath.rollout.split import Split
from twinpath.rollout.state import RolloutState, Status

pytestmark = pytest.mark.timeout(300)
NAME = "by-row"


@pytest.fixture(scope="module")
def shelf(on_file: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    """Version 1 answers 0.25, version 2 answers 0.75."""
    folder = tmp_path_factory.mktemp("by-row")
    on_file.register(NAME, skops(folder / "1", constant(0.25)), "champion")
    on_file.register(NAME, skops(folder / "2", constant(0.75)))
    return on_file


@pytest.fixture
def node(shelf: Shelf) -> Iterator[RegistryModel]:
    made = RegistryModel(
        NAME, tracking_uri=shelf.uri, inputs=dict.fromkeys("abc", "float64"), key="tail",
        segments=["carrier"], model_version="version", poll_s=0.1,
    )  # fmt: skip
    made.setup()
    yield made
    made.teardown()
    shelf.client.set_registered_model_tag(NAME, ROLLOUT_TAG, "")


def rollout(**more: Any) -> RolloutState:
    given = {"id": "r1", "model": NAME, "incumbent": "1", "challenger": "2"} | more
    return RolloutState(**given)


def rows(n: int) -> dict[str, np.ndarray]:
    tails = np.array([f"N{i:04d}" for i in range(n)], object)
    carriers = np.array([("UA", "DL")[i % 2] for i in range(n)], object)
    tiled = {name: np.resize(values, n) for name, values in columns(20).items()}
    return tiled | {"tail": tails, "carrier": carriers}


def follow(node: RegistryModel, shelf: Shelf, state: RolloutState | None) -> None:
    """Write a state to the registry, and wait until the node has done what it says."""
    shelf.client.set_registered_model_tag(NAME, ROLLOUT_TAG, state.to_tag() if state else "")
    live = state is not None and state.live
    until(lambda: (node.status()["rollout"] is not None) == live, "the node has read it")
    wanted = set(state.versions if state is not None and live else ("1",))
    until(lambda: set(node.versions()) == wanted, f"versions {wanted} are live")


def until(condition: Callable[[], Any], what: str, timeout_s: float = 100) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.05)


def test_rows_go_to_the_versions_that_the_rollout_says_and_come_back_in_order(
    node: RegistryModel, shelf: Shelf
):
    state = rollout(share=0.3, key=("tail",))
    follow(node, shelf, state)
    given = rows(200)
    mine = Split.of(state).parts(given).challenger
    assert 20 < mine.sum() < 100
    found = node.predict(given)
    np.testing.assert_allclose(found["score"], np.where(mine, 0.75, 0.25))
    assert found["version"].tolist() == np.where(mine, "2", "1").tolist()
    assert found[f"{NOTE}version"].tolist() == found["version"].tolist()
    # The same key stays, alone and in another batch.
    for row in (0, 7, 150):
        one = {name: values[row : row + 1] for name, values in given.items()}
        assert node.predict(one)["version"][0] == found["version"][row]


def test_the_nodes_own_key_is_used_where_the_rollout_names_none(node: RegistryModel, shelf: Shelf):
    follow(node, shelf, rollout(share=0.5))
    given = rows(100)
    first = node.predict(given)["version"]
    moved = given | {"a": given["a"] + 1.0}
    assert node.predict(moved)["version"].tolist() == first.tolist()


def test_what_is_counted_is_by_version_and_segment(node: RegistryModel, shelf: Shelf):
    follow(node, shelf, rollout(share=0.5, key=("tail",)))
    node.drain_reports()
    found = node.predict(rows(100))["version"]
    report = node.drain_reports()
    for version in ("1", "2"):
        sketch = report.versions[version]
        assert sketch.overall.rows == (found == version).sum()
        by_carrier = {value: tally.rows for value, tally in sketch.segments["carrier"].items()}
        assert sum(by_carrier.values()) == sketch.overall.rows
        assert set(by_carrier) == {"UA", "DL"}
    assert not node.drain_reports().versions


def test_a_challenger_that_raises_harms_nobody_and_is_counted(
    node: RegistryModel, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
):
    follow(node, shelf, rollout(share=0.5, key=("tail",)))
    node.drain_reports()
    with node._slots.use("2") as slot:

        def broken(_: Any) -> Any:
            raise ValueError("a fault, put here")

        monkeypatch.setattr(slot.live.model, "predict", broken)
    found = node.predict(rows(100))
    np.testing.assert_allclose(found["score"], 0.25)
    assert set(found["version"]) == {"1"}
    report = node.drain_reports()
    assert report.versions["2"].overall.errors == report.versions["2"].overall.rows > 20
    assert report.versions["1"].overall.errors == 0


def test_a_shadow_answers_nobody_and_scores_copies(node: RegistryModel, shelf: Shelf):
    follow(node, shelf, rollout(kind="shadow", mirror=1.0))
    node.drain_reports()
    found = node.predict(rows(50))
    np.testing.assert_allclose(found["score"], 0.25)
    until(lambda: node.status()["mirror"]["mirrored"] == 50, "copies were given")
    counted = 0

    def all_counted() -> bool:
        nonlocal counted
        sketch = node.drain_reports().versions.get("2")
        counted += sketch.overall.rows if sketch is not None else 0
        return counted == 50

    until(all_counted, "copies were scored")


def test_copies_beyond_the_bound_are_dropped_and_never_waited_for(
    node: RegistryModel, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
):
    import threading

    follow(node, shelf, rollout(kind="shadow", mirror=1.0))
    before = node.status()["mirror"]
    release = threading.Event()
    with node._slots.use("2") as slot:
        right = slot.live.model.predict

        def stuck(inputs: Any) -> Any:
            release.wait(60)
            return right(inputs)

        monkeypatch.setattr(slot.live.model, "predict", stuck)
    try:
        for _ in range(20):
            np.testing.assert_allclose(node.predict(rows(50))["score"], 0.25)
        after = node.status()["mirror"]
        assert after["mirrored"] - before["mirrored"] <= 256
        assert after["mirrored"] + after["dropped"] - before["mirrored"] - before["dropped"] == 1000
    finally:
        release.set()


def test_a_pin_goes_before_the_split(node: RegistryModel, shelf: Shelf):
    follow(node, shelf, rollout(share=0.5, key=("tail",)))
    given = rows(60)
    free = node.predict(given)["version"]
    pins = np.array(["1", "2", None] * 20, object)
    found = node.predict(given | {PIN: pins})["version"]
    expected = np.where(pins == "1", "1", np.where(pins == "2", "2", free))
    assert found.tolist() == expected.tolist()


def test_a_rollout_that_is_over_leaves_the_alias_to_say_what_serves(
    node: RegistryModel, shelf: Shelf
):
    follow(node, shelf, rollout(share=0.5))
    follow(node, shelf, rollout(share=0.5, status=Status.ROLLED_BACK))
    assert set(node.predict(rows(50))["version"]) == {"1"}


def test_a_state_that_is_told_is_followed_before_the_next_reading(
    node: RegistryModel, shelf: Shelf
):
    state = rollout(share=1.0)
    shelf.client.set_registered_model_tag(NAME, ROLLOUT_TAG, state.to_tag())
    assert node.apply(state.to_tag())
    assert node.status()["rollout"]["share"] == 1.0


def test_a_state_that_cannot_be_read_is_named_and_nothing_changes(
    node: RegistryModel, shelf: Shelf
):
    shelf.client.set_registered_model_tag(NAME, ROLLOUT_TAG, '{"share": "all"}')
    until(lambda: node.status()["problem"], "it is noted")
    assert "twinpath.rollout" in node.status()["problem"]
    assert set(node.predict(rows(10))["version"]) == {"1"}


def test_another_alias_is_not_moved_by_this_rollout(shelf: Shelf, tmp_path: Path):
    shelf.client.set_registered_model_alias(NAME, "steady", "1")
    shelf.client.set_registered_model_tag(NAME, ROLLOUT_TAG, rollout(share=1.0).to_tag())
    other = RegistryModel(NAME, alias="steady", tracking_uri=shelf.uri, model_version="version")
    other.setup()
    try:
        assert set(other.predict(columns(5))["version"]) == {"1"}
        assert other.status()["rollout"] is None
    finally:
        other.teardown()
        shelf.client.set_registered_model_tag(NAME, ROLLOUT_TAG, "")
