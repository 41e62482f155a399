"""One local Ray with Serve for the tests that need the real runtimes."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="package")
def ray_and_serve(tmp_path_factory):
    import ray
    from ray import serve

    from twinpath.online.session import free_ports

    path = os.pathsep.join([str(ROOT / "platform"), str(ROOT), str(ROOT / "tests")])
    ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        runtime_env={"env_vars": {"PYTHONPATH": path}},
    )
    port = free_ports(1)[0]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()
