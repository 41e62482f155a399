"""The registry is away, damaged or slow: what serves goes on, and says so."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from registered_models import Shelf, columns, constant, skops

from twinpath import RegistryModel
from twinpath.errors import RegistryError, UnknownModelError
from twinpath.registry.client import Registry
from twinpath.registry.reference import ModelReference

pytestmark = pytest.mark.timeout(400)
DOWN = "http://127.0.0.1:9"  # the port that discards; nobody listens


def node(name: str, uri: str, **more: Any) -> RegistryModel:
    inputs = dict.fromkeys("abc", "float64")
    return RegistryModel(name, tracking_uri=uri, inputs=inputs, poll_s=0.1, **more)


def until(condition: Any, what: str, timeout_s: float = 100) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.05)


def test_a_server_that_stops_does_not_stop_what_serves(
    server: Any, on_server: Shelf, tmp_path: Path
):
    server.start()  # a run before this one may have ended while it was stopped
    on_server.register("lasting", skops(tmp_path / "one", constant(0.25)), "champion")
    second = on_server.register("lasting", skops(tmp_path / "two", constant(0.5)))
    first = node("lasting", on_server.uri, timeout_s=2)
    first.setup()
    try:
        assert first.notes() == []
        server.stop()
        try:
            until(lambda: first.notes(), "the node says that its registry is away")
            assert "has not answered" in first.notes()[0]
            np.testing.assert_allclose(first.predict(columns(3))["score"], 0.25)
            # A replica that starts meanwhile serves what served last on this node.
            late = node("lasting", on_server.uri, timeout_s=2)
            late.setup()
            np.testing.assert_allclose(late.predict(columns(3))["score"], 0.25)
            assert "has not answered" in late.notes()[0]
        finally:
            server.start()
        on_server.alias("lasting", second)
        for each in (first, late):
            until(lambda each=each: each.status()["serving"] == second, "it follows again")
            np.testing.assert_allclose(each.predict(columns(3))["score"], 0.5)
            until(lambda each=each: each.notes() == [], "and has nothing to complain of")
        late.teardown()
    finally:
        first.teardown()


def test_without_a_registry_and_without_anything_kept_there_is_an_error_that_says_so():
    with pytest.raises(RegistryError, match=r"127\.0\.0\.1:9"):
        node("nothing", DOWN, timeout_s=2).setup()


def test_a_call_ends_in_time_however_long_the_registry_takes():
    import socket

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        registry = Registry(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=1)
        with pytest.raises(RegistryError, match=r"did not answer within 1 s|failed about"):
            registry.state("anything")
        registry.close()


def test_what_the_registry_does_not_have_is_unknown(on_file: Shelf, tmp_path: Path):
    on_file.register("known", skops(tmp_path / "model"), "champion")
    registry = Registry(on_file.uri)
    assert registry.resolve(ModelReference("known")).version == "1"
    for reference in (
        ModelReference("known", alias="nobody"),
        ModelReference("known", version="99"),
        ModelReference("unknown"),
    ):
        with pytest.raises(UnknownModelError):
            registry.resolve(reference)
    with pytest.raises(UnknownModelError):
        registry.set_alias("known", "champion", "99")
    registry.close()


def test_a_version_that_served_last_steps_in_for_one_that_is_refused(
    on_file: Shelf, tmp_path: Path
):
    """A replica that starts while the alias names a bad version."""
    on_file.register("stepped-in", skops(tmp_path / "good", constant(0.25)), "champion")
    before = node("stepped-in", on_file.uri)
    before.setup()
    before._slots._jobs.put(lambda: None)
    until(lambda: before._cache.last_served(on_file.uri, str(before.reference)), "remembered")
    before.teardown()
    broken = skops(tmp_path / "bad")
    (broken / "model.skops").write_bytes(b"PK\x03\x04")
    on_file.register("stepped-in", broken, "champion")
    after = node("stepped-in", on_file.uri)
    after.setup()
    try:
        np.testing.assert_allclose(after.predict(columns(3))["score"], 0.25)
        assert any("version 2" in note and "is refused" in note for note in after.notes())
    finally:
        after.teardown()


def test_a_first_version_that_is_refused_is_why_the_node_does_not_start(
    on_file: Shelf, tmp_path: Path
):
    from twinpath.errors import ModelLoadError

    broken = skops(tmp_path / "bad")
    (broken / "model.skops").write_bytes(b"PK\x03\x04")
    on_file.register("never-good", broken, "champion")
    with pytest.raises(ModelLoadError, match="version 1 of 'never-good' is refused"):
        node("never-good", on_file.uri).setup()


def test_to_save_memory_the_old_version_goes_before_the_new_one_comes(
    on_file: Shelf, tmp_path: Path
):
    on_file.register("frugal", skops(tmp_path / "one", constant(0.25)), "champion")
    frugal = node("frugal", on_file.uri, policy="resource")
    frugal.setup()
    try:
        on_file.register("frugal", skops(tmp_path / "two", constant(0.5)), "champion")
        until(lambda: frugal.status()["serving"] == "2", "version 2 serves")
        np.testing.assert_allclose(frugal.predict(columns(3))["score"], 0.5)
        assert [each["version"] for each in frugal.status()["versions"]] == ["2"]
    finally:
        frugal.teardown()


def test_versions_that_are_kept_live_can_be_asked_for(on_file: Shelf, tmp_path: Path):
    from twinpath.graph.columns import PIN, ROW_ERROR
    from twinpath.registry.reference import LIVE_TAG

    on_file.register("kept", skops(tmp_path / "one", constant(0.25)))
    on_file.register("kept", skops(tmp_path / "two", constant(0.5)), "champion")
    on_file.client.set_registered_model_tag("kept", LIVE_TAG, "1")
    kept = node("kept", on_file.uri, model_version="version")
    kept.setup()
    try:
        assert kept.versions() == ["2", "1"]
        asked = np.array(["1", None, "2", "7"], object)
        found = kept.predict(columns(4) | {PIN: asked})
        np.testing.assert_allclose(found["score"][:3], [0.25, 0.5, 0.5])
        assert found["version"][:3].tolist() == ["1", "2", "2"]
        errors = found[ROW_ERROR].tolist()
        assert errors[:3] == [None] * 3
        assert errors[3].code == UnknownModelError.code
        with pytest.raises(UnknownModelError, match="no live version '7'"):
            kept.predict(columns(1) | {PIN: np.array(["7"], object)})
    finally:
        kept.teardown()
