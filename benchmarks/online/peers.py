"""Who is measured, and how each is started: as its own documentation advises for speed, with
batching wherever it has it, access logs off, and workers that suit two cores."""

import contextlib
import json
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.online import environments, served
from benchmarks.online.environments import PeerError
from benchmarks.online.models import ANSWER_WIDTH, MAX_BATCH, WIDTH
from benchmarks.online.processes import Served, running
from twinpath.online.session import free_ports

_SERVERS = "benchmarks.online.servers"
_TENSORS = ("tabular", "torch", "echo")


@dataclass(frozen=True)
class Server:
    """``serve(model, folder)`` runs it for a block; it raises PeerError. ``binary`` is None where
    it has no binary form; ``python`` marks the servers among which the best Python peer is looked
    for."""

    title: str
    serve: Callable[[str, Path], AbstractContextManager[Served]]
    form: str
    binary: str | None = None
    models: tuple[str, ...] = _TENSORS
    python: bool = True


@contextlib.contextmanager
def triton(model: str, folder: Path) -> Iterator[Served]:
    """The Python backend with one instance, which gets the largest batches, and 4 HTTP threads:
    of 1 and 2 instances, 2, 4 and 8 threads, none was clearly faster on 2 cores."""
    place = environments.ensure("triton")
    home = place / _packages() / "pytriton" / "tritonserver"
    backend = home / "backends" / "python"
    stub = home / "python_backend_stubs" / "3.11" / "triton_python_backend_stub"
    shutil.copy2(stub, backend)
    version = folder / "repository" / model / "1"
    version.mkdir(parents=True)
    shutil.copy(Path(__file__).parent / "servers" / "triton.py", version / "model.py")
    (version.parent / "config.pbtxt").write_text(
        f'name: "{model}"\nbackend: "python"\nmax_batch_size: {MAX_BATCH}\n'
        "dynamic_batching { }\n"
        f'input [ {{ name: "x" data_type: TYPE_FP32 dims: [ {WIDTH[model]} ] }} ]\n'
        f'output [ {{ name: "y" data_type: TYPE_FP32 dims: [ {ANSWER_WIDTH[model]} ] }} ]\n'
        "instance_group [ { kind: KIND_CPU count: 1 } ]\n"
    )
    [port] = free_ports(1)
    # Its interpreter is found by PATH, whose `python3` says which packages it sees.
    library = {"LD_LIBRARY_PATH": sysconfig.get_config_var("LIBDIR")}
    command = [
        str(home / "bin" / "tritonserver"), f"--model-repository={version.parent.parent}",
        f"--backend-directory={home / 'backends'}", "--http-address=127.0.0.1",
        f"--http-port={port}", "--http-thread-count=4", "--allow-grpc=false",
        "--allow-metrics=false",
    ]  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    with running(command, f"{url}/v2/health/ready", folder, _env(place, model) | library) as family:
        yield Served(f"{url}/v2/models/{model}/infer", family)


@contextlib.contextmanager
def litserve(model: str, folder: Path) -> Iterator[Served]:
    """See servers/litserve_api.py for its settings."""
    place = environments.ensure("litserve")
    [port] = free_ports(1)
    command = [str(place / "bin" / "python"), "-m", f"{_SERVERS}.litserve_api", model, str(port)]
    url = f"http://127.0.0.1:{port}"
    with running(command, f"{url}/health", folder, _env(place, model)) as family:
        yield Served(f"{url}/predict", family)


@contextlib.contextmanager
def mlserver(model: str, folder: Path) -> Iterator[Served]:
    """Adaptive batching on; a longer wait than 0.1 ms costs a lone connection all of it. In its own
    process: parallel workers cost a copy of each request to another process, which these models
    do not repay."""
    place = environments.ensure("mlserver")
    ports = free_ports(3)
    settings = {
        "debug": False, "host": "127.0.0.1", "http_port": ports[0], "grpc_port": ports[1],
        "metrics_port": ports[2], "metrics_endpoint": None, "parallel_workers": 0,
        "gzip_enabled": False,
    }  # fmt: skip
    (folder / "settings.json").write_text(json.dumps(settings))
    described = {
        "name": model, "implementation": f"{_SERVERS}.mlserver_model.Model",
        "max_batch_size": 64, "max_batch_time": 0.0001,
    }  # fmt: skip
    (folder / "model-settings.json").write_text(json.dumps(described))
    url = f"http://127.0.0.1:{ports[0]}"
    command = [str(place / "bin" / "mlserver"), "start", str(folder)]
    with running(command, f"{url}/v2/models/{model}/ready", folder, _env(place, model)) as family:
        yield Served(f"{url}/v2/models/{model}/infer", family)


@contextlib.contextmanager
def kserve(model: str, folder: Path) -> Iterator[Served]:
    """Two workers, which beat one on 2 cores; no gRPC, logs of requests off."""
    place = environments.ensure("kserve")
    [port] = free_ports(1)
    quiet = {"version": 1, "disable_existing_loggers": False, "root": {"level": "WARNING"}}
    loggers = {"uvicorn.access": {"handlers": [], "propagate": False}}
    (folder / "log.json").write_text(json.dumps(quiet | {"loggers": loggers}))
    command = [
        str(place / "bin" / "python"), "-m", f"{_SERVERS}.kserve_model", "--model_name", model,
        "--http_port", str(port), "--enable_grpc", "false", "--workers", "2",
        "--enable_latency_logging", "false", "--log_config_file", str(folder / "log.json"),
    ]  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    with running(command, f"{url}/v2/health/ready", folder, _env(place, model)) as family:
        yield Served(f"{url}/v2/models/{model}/infer", family)


@contextlib.contextmanager
def bentoml(model: str, folder: Path) -> Iterator[Served]:
    """See servers/bentoml_service.py for its settings."""
    place = environments.ensure("bentoml")
    [port] = free_ports(1)
    command = [
        str(place / "bin" / "bentoml"), "serve", f"{_SERVERS}.bentoml_service:Service",
        "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    home = {"BENTOML_HOME": str(folder / "bentoml"), "BENTOML_DO_NOT_TRACK": "True"}
    url = f"http://127.0.0.1:{port}"
    with running(command, f"{url}/readyz", folder, _env(place, model) | home) as family:
        yield Served(f"{url}/predict", family)


@contextlib.contextmanager
def mlflow(model: str, folder: Path) -> Iterator[Served]:
    """One worker, and no batching, which it has none of. With two its server answers a lone
    connection in 44 ms instead of 2, and 32 connections no faster."""
    place = environments.ensure("mlflow")
    env = _env(place, model) | {"MLFLOW_DISABLE_TELEMETRY": "true", "UVICORN_ACCESS_LOG": "false"}
    python = str(place / "bin" / "python")
    saved = folder / "saved"
    done = subprocess.run(
        [python, "-m", f"{_SERVERS}.mlflow_model", model, str(saved)],
        env=env, cwd=folder, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    if done.returncode:
        raise PeerError(f"the model was not saved: {done.stderr[-800:]}")
    [port] = free_ports(1)
    command = [
        python, "-m", "mlflow", "models", "serve", "--model-uri", str(saved), "--host",
        "127.0.0.1", "--port", str(port), "--env-manager", "local", "--workers", "1",
    ]  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    with running(command, f"{url}/ping", folder, env) as family:
        yield Served(f"{url}/invocations", family)


def _packages() -> str:
    return f"lib/python{sysconfig.get_python_version()}/site-packages"


def _env(place: Path, model: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    return kept | {
        "PATH": f"{place / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "PYTHONPATH": str(served.ROOT),
        "BENCHMARK_MODEL": model,
        "BENCHMARK_ROOT": str(served.ROOT),
    }


OURS = "twinpath"
#: By name, in the order of the first round.
SERVERS: Mapping[str, Server] = {
    OURS: Server("Twinpath", served.twinpath, "oip", "oip-binary", (*_TENSORS, "flights")),
    "triton": Server("Triton 2.51", triton, "oip", "oip-binary", python=False),
    "litserve": Server("LitServe 0.2.19", litserve, "plain"),
    "mlserver": Server("MLServer 1.7.1", mlserver, "oip"),
    "kserve": Server("KServe 0.21 Python server", kserve, "oip"),
    "bentoml": Server("BentoML 1.4.39", bentoml, "bentoml"),
    "mlflow": Server("MLflow 3.17.2 models serve", mlflow, "mlflow"),
    "serve": Server(
        "stock Ray Serve 2.60", served.stock_serve, "plain", None, (*_TENSORS, "flights"), False
    ),
}
