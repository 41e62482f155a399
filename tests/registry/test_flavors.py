"""Every flavor, registered in a real registry and loaded by the node, answers as the model does."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from registered_models import FLAVORS, TEXTS, Shelf, columns, skops, trained

from twinpath import RegistryModel
from twinpath.registry.reference import DIGEST_TAG

pytestmark = pytest.mark.timeout(300)


def loaded(name: str, shelf: Shelf, **more: Any) -> RegistryModel:
    """A node with what the registry says should serve."""
    inputs = more.pop("inputs", dict.fromkeys("abc", "float64"))
    node = RegistryModel(name, tracking_uri=shelf.uri, inputs=inputs, **more)
    node.setup()
    return node


@pytest.mark.parametrize("flavor", FLAVORS)
def test_a_flavor_answers_as_its_model_does(flavor: str, on_server: Shelf, tmp_path: Path):
    files, expected, more = FLAVORS[flavor](tmp_path / flavor)
    on_server.register(flavor, files, alias="champion")
    node = loaded(flavor, on_server, **more)
    try:
        given: dict[str, Any] = columns(20)
        if flavor == "transformers":
            given = {"text": np.array(TEXTS, object)}
        elif "float32" in more.get("inputs", {}).values():
            given = {name: values.astype(np.float32) for name, values in given.items()}
        n = len(next(iter(given.values())))
        found = node.predict(given)["score"]
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, expected[:n], rtol=1e-4, atol=1e-5)
        one = {name: values[:1] for name, values in given.items()}
        np.testing.assert_allclose(node.predict(one)["score"], expected[:1], rtol=1e-4, atol=1e-5)
        assert node.status()["versions"][0]["state"] == "ready"
        assert not node.status()["versions"][0]["reason"]
    finally:
        node.teardown()


def test_a_registry_in_a_sqlite_file_serves_as_well(on_file: Shelf, tmp_path: Path):
    model = trained()
    on_file.register("in-a-file", skops(tmp_path / "model", model), alias="champion")
    node = loaded("in-a-file", on_file)
    try:
        expected = model.predict_proba(np.column_stack(list(columns(5).values())))[:, 1]
        np.testing.assert_allclose(node.predict(columns(5))["score"], expected)
    finally:
        node.teardown()


def test_classes_are_returned_where_the_output_is_a_whole_number(on_file: Shelf, tmp_path: Path):
    model = trained()
    on_file.register("classes", skops(tmp_path / "model", model), alias="champion")
    node = loaded("classes", on_file, outputs={"late": "int64"})
    try:
        expected = model.predict(np.column_stack(list(columns(9).values())))
        assert node.predict(columns(9))["late"].tolist() == expected.tolist()
    finally:
        node.teardown()


def test_probabilities_of_all_classes_are_returned_where_the_output_has_room(
    on_file: Shelf, tmp_path: Path
):
    on_file.register("both", skops(tmp_path / "model"), alias="champion")
    node = loaded("both", on_file, outputs={"p": "float64[2]"})
    try:
        np.testing.assert_allclose(node.predict(columns(9))["p"].sum(axis=1), 1.0)
    finally:
        node.teardown()


def test_a_version_whose_digest_is_noted_in_the_registry_is_checked_against_it(
    on_file: Shelf, tmp_path: Path
):
    from twinpath.errors import ArtifactError

    files = skops(tmp_path / "model")
    on_file.register("noted", files, "champion", **{DIGEST_TAG: "sha256:" + "0" * 64})
    with pytest.raises(ArtifactError, match="damaged or were changed"):
        loaded("noted", on_file)
