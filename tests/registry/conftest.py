"""A real MLflow server and a SQLite file, started once for all of these tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("mlflow")

from mlflow_server import MlflowServer as Server
from registered_models import Shelf  # after the check above


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server, running."""
    made = Server(tmp_path_factory.mktemp("mlflow"))
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="session")
def on_server(server: Server) -> Shelf:
    """The server's registry."""
    return Shelf(server.uri, server.folder)


@pytest.fixture(scope="session")
def on_file(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    """The registry in a SQLite file."""
    folder = tmp_path_factory.mktemp("registry")
    (folder / "artifacts").mkdir()
    return Shelf(f"sqlite:///{folder}/mlflow.db", folder / "artifacts")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test has an artifact cache of its own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("TWINPATH_CACHE", str(folder))
    return folder
