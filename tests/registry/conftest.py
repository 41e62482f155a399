"""A real MLflow server and a SQLite file, started once for all of these tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("mlflow")

# After the check above.
from mlflow_server import MlflowServer as Server
from registered_models import Shelf
from rolling import HERE, MODEL, ROOT, Rolling, register, session_env

from twinpath.online.session import ServeSession


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server, running."""
    made = Server(tmp_path_factory.mktemp("mlflow"))
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="package")
def on_server(server: Server) -> Shelf:
    """The server's registry."""
    return Shelf(server.uri, server.folder)


@pytest.fixture(scope="package")
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


@pytest.fixture(scope="package")
def rolling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rolling]:
    """The graph on two nodes, a replica on each, and the controller on the second; version 1
    serves. It has an MLflow server of its own, which may be stopped. One for all rollouts: the
    tests that lose a part of it are in the file that comes last (`test_rollouts_lost`)."""
    folder = tmp_path_factory.mktemp("rollouts")
    mlflow = Server(folder)
    try:
        mlflow.start()
        register(mlflow.uri, seed=1)
        from mlflow import MlflowClient

        MlflowClient(mlflow.uri, mlflow.uri).set_registered_model_alias(MODEL, "champion", "1")
        with ServeSession(
            num_cpus=4,
            pythonpath=[ROOT / "platform", ROOT, HERE],
            env=session_env(mlflow, folder),
            head_only=True,
        ) as session:
            found = Rolling(session, mlflow, folder)
            found.node = session.add_node(4, {"control": 1.0})
            controller = {"num_cpus": 0, "resources": {"control": 0.1}}
            found.deploy(
                deployments=[
                    {"name": "delays", "max_replicas_per_node": 1},
                    {"name": "rollout-controller", "ray_actor_options": controller},
                ]
            )
            yield found
    finally:
        mlflow.stop()
