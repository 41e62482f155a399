"""Servers of the benchmark on Ray: ours, and stock Serve. Each has a Ray of its own."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from benchmarks.online.environments import PeerError
from benchmarks.online.processes import Served
from graphs.flights_model.schema import DIRECTORY_VARIABLE, flights_dir
from twinpath.errors import TwinpathError
from twinpath.online.session import ServeSession

ROOT = Path(__file__).resolve().parents[2]
_PREFIX = "/bench"


@contextlib.contextmanager
def twinpath(model: str, folder: Path) -> Iterator[Served]:
    """Our graph of the model, as ``serve deploy`` serves it."""
    if model == "flights":
        where, path = "benchmarks.fused_graph:app", "/predict"
    else:
        where, path = f"benchmarks.online.graphs:{model}", f"/v2/models/{model}/infer"
    with _session(where, model, folder, path, fast_path=True) as found:
        yield found


@contextlib.contextmanager
def stock_serve(model: str, folder: Path) -> Iterator[Served]:
    """The model on Serve without anything of ours."""
    flights = model == "flights"
    where = "benchmarks.fused_graph:stock" if flights else "benchmarks.online.stock_serve:app"
    with _session(where, model, folder, "", fast_path=False) as found:
        yield found


@contextlib.contextmanager
def _session(
    import_path: str, model: str, folder: Path, path: str, *, fast_path: bool
) -> Iterator[Served]:
    config = folder / "app.yaml"
    # A model that computes for long is worth a process for each core; a quick one, the latency of
    # one process.
    two = fast_path and model == "torch"
    args = "  args: {ingress: {replicas: {min: 2, max: 2}}}\n" if two else ""
    # No access logs in any server of this benchmark.
    config.write_text(
        f"applications:\n- name: bench\n  route_prefix: {_PREFIX}\n  import_path: {import_path}\n"
        f"  logging_config: {{enable_access_log: false}}\n{args}"
    )
    try:
        with ServeSession(
            num_cpus=8,
            fast_path=fast_path,
            pythonpath=[ROOT / "platform", ROOT],
            env={DIRECTORY_VARIABLE: str(flights_dir()), "BENCHMARK_MODEL": model},
        ) as session:
            session.deploy(config)
            if fast_path:
                # Serve calls it running somewhat before HAProxy knows the way to it.
                session.wait_until_ready(f"{_PREFIX}/readyz")
            yield Served(session.url + _PREFIX + path, session.processes)
    except TwinpathError as error:
        raise PeerError(str(error)[-1500:]) from None
