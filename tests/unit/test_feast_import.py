"""Feast without what its readers do not need. Each test is a process: imports happen once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("feast")
pytestmark = pytest.mark.slow


def run(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_readers_of_features_import_neither_torch_nor_checks():
    told = run("""
import sys, typeguard
checked = typeguard.typechecked
from twinpath.features.feast_import import feast_
feast = feast_()
assert feast_() is feast is sys.modules["feast"]
assert "torch" not in sys.modules
assert typeguard.typechecked is checked
print(len(feast.Entity(name="user").join_key), type(feast.Field(name="x", dtype=3)).__name__)
""")
    assert told == "4 Field\n"


def test_torch_is_there_for_those_of_feasts_methods_that_want_it():
    pytest.importorskip("torch")
    told = run("""
import sys
from twinpath.features.feast_import import feast_
feast_()
from feast import online_response
assert "torch" not in sys.modules
print(online_response.get_torch().__name__, online_response.get_torch().__name__)
import feast.torch_wrapper
print(feast.torch_wrapper.TORCH_AVAILABLE)
""")
    assert told == "torch torch\nTrue\n"


def test_a_feast_that_cannot_be_imported_leaves_nothing_behind():
    told = run("""
import sys, typeguard
checked = typeguard.typechecked
from twinpath.errors import MissingExtraError
from twinpath.features.feast_import import feast_
sys.path_hooks.clear()
sys.path_importer_cache.clear()
try:
    feast_()
except MissingExtraError as error:
    print(error)
assert typeguard.typechecked is checked
assert "feast.torch_wrapper" not in sys.modules
""")
    assert "pip install" in told


def test_definitions_are_checked_by_feast_when_they_are_applied(tmp_path: Path):
    (tmp_path / "definitions.py").write_text("from feast import Entity\nuser = Entity(name=3)\n")
    store = {"type": "sqlite", "path": str(tmp_path / "online.db")}
    config = {
        "project": "checked", "provider": "local", "registry": str(tmp_path / "registry.db"),
        "online_store": store, "entity_key_serialization_version": 3,
    }  # fmt: skip
    (tmp_path / "feature_store.yaml").write_text(json.dumps(config))
    told = run(
        """
import sys
from twinpath.cli import app
from twinpath.errors import ConfigError
try:
    app(["features", "apply", "--repo", sys.argv[1]])
except ConfigError as error:
    print(error)
""",
        str(tmp_path),
    )
    assert 'argument "name" (int) is not an instance of str' in told
