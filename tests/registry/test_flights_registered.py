"""The flights example registers what it trains, and its graph serves that."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.ensemble import HistGradientBoostingClassifier

from graphs.flights_model.nodes import FEATURES, DelayModel, save_model
from graphs.flights_model.registered import MODEL, delay_model, ensure_registered, registry_uri
from twinpath.registry.client import Registry

RNG = np.random.default_rng(0)
X = RNG.normal(size=(400, len(FEATURES)))


def train(directory: Path, seed: int) -> None:
    (directory / "model").mkdir(exist_ok=True)
    late = X[:, seed] > 0
    model = HistGradientBoostingClassifier(max_iter=5, random_state=seed).fit(X, late)
    save_model(directory / "model" / "delay.joblib", model)


@pytest.mark.timeout(300)
def test_what_was_trained_is_registered_once_and_served_with_the_same_answers(tmp_path: Path):
    train(tmp_path, 0)
    assert ensure_registered(tmp_path) == "1"
    assert ensure_registered(tmp_path) == "1"
    columns = {name: X[:50, i].astype(np.float32) for i, name in enumerate(FEATURES)}
    own = DelayModel(str(tmp_path))
    own.setup()
    node = delay_model(tmp_path)
    node.setup()
    try:
        first = node.predict(columns)["p_delay"]
        np.testing.assert_array_equal(first, own.predict(columns)["p_delay"])
        train(tmp_path, 1)
        assert ensure_registered(tmp_path) == "2"
        node._watcher.read()
        assert node._slots.wait(100)
        assert node.status()["serving"] == "2"
        assert not np.array_equal(node.predict(columns)["p_delay"], first)
    finally:
        node.teardown()
    registry = Registry(registry_uri(tmp_path))
    assert registry.state(MODEL).aliases == {"champion": "2"}
    registry.close()
