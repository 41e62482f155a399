"""The one place that holds the environment of a fast Serve: HAProxy in front, no Python proxy,
and predictions that go straight from a replica's HTTP server to its graph.

Serve reads these variables when it is imported, in every process: they must be set before
``ray start`` (or ``serve run`` on a fresh machine), on every node. ``cluster.yaml`` carries them.
"""

import os
import sysconfig
from collections.abc import Mapping
from pathlib import Path

#: Seconds that a client may take to send the headers of a request, and may be silent in the middle
#: of anything else; an hour is what Serve gives it, and for headers there is no bound at all.
HEADERS_S, SILENCE_S = 30, 300
#: Variable that says how nice Ray's housekeeping is (`housekeeping`); 0 leaves it as it is.
NICENESS = "TWINPATH_HOUSEKEEPING_NICENESS"


def slow_clients(headers_s: int, silence_s: int) -> dict[str, str]:
    """Variables by which HAProxy gives up clients that are too slow, and those that hung up.

    Serve has none for HAProxy's `timeout http-request`. It writes the algorithm as it is into the
    section of defaults, though, where lines of our own can follow. How long a body may take is
    the replica's to see to (`slow_bodies`).

    Serve sets `splice-request`. With it HAProxy 2.8 looks no more at a client whose body came in
    another packet than its headers, as most HTTP clients send them, and does not notice that it
    hangs up while the answer is made.
    """
    lines = ["leastconn", "no option splice-request", f"timeout http-request {headers_s}s"]
    return {
        "RAY_SERVE_HAPROXY_BALANCE_ALGORITHM": "\n".join(lines),
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(silence_s),
    }


def batch_haproxy() -> dict[str, str]:
    """The variable by which Serve starts HAProxy as a batch process (`haproxy`). None where this
    installation has no command for that, since Serve would have no HAProxy then, or where the
    environment names another one."""
    name = "RAY_SERVE_HAPROXY_BINARY_PATH"
    command = Path(sysconfig.get_path("scripts"), "twinpath-haproxy")
    if not (command.is_file() and os.access(command, os.X_OK)):
        return {}
    given = os.environ.get(name) or str(command)
    return {name: str(command)} if Path(given).name == command.name else {}


#: Variable → value.
FAST_PATH: dict[str, str] = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_HAPROXY_NBTHREAD": "1",
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    # Predictions pass Serve's wrapper by, on the loop that the HTTP server runs on.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "twinpath.online.fastpath:middlewares",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    # HAProxy learns of a replica that ends within a second; Serve's 30 s are for balancers that
    # do not, and make Ctrl-C in `serve run` take as long.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
    # One in a thousand requests is logged to syslog, not each.
    "RAY_SERVE_HAPROXY_LOG_TARGET": "127.0.0.1:514 sample 1:1000",
    **slow_clients(HEADERS_S, SILENCE_S),
    **batch_haproxy(),
    # Ray runs workers at niceness 15, behind everything else on the machine. Its own housekeeping
    # goes behind them instead; see `housekeeping`.
    "RAY_worker_niceness": "0",
    NICENESS: "10",
    "RAY_USAGE_STATS_ENABLED": "0",
}

#: Without these, requests go through Serve's Python proxy, or through Serve's wrapper.
_ESSENTIAL = (
    "RAY_SERVE_ENABLE_HA_PROXY",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD",
)

#: What Serve's option ``grpc_servicer_functions`` has to name for gRPC to be served.
GRPC_SERVICES = "twinpath.online.grpc_door:add_to_server"


def slow_path(env: Mapping[str, str], request_timeout_s: float | None = None) -> str | None:
    """Why a replica with this environment, and this option of Serve, is slow, and what to do about
    it; None if it is not."""
    wrong = [name for name in _ESSENTIAL if env.get(name) != FAST_PATH[name]]
    if not wrong and request_timeout_s:
        return (
            f"Serve's option request_timeout_s is {request_timeout_s:g}: it is kept, and to keep "
            "it every HTTP request takes a way that is several times slower. Leave it out, and "
            "bound the wait with ingress.queue_timeout_s, or with x-request-timeout-ms in a request"
        )
    if not wrong:
        return None
    given = ", ".join(f"{name} is {env.get(name, 'not set')!s}" for name in wrong)
    return (
        f"Serve was started without the fast path ({given}): every request takes a way that is "
        'several times slower. Stop Ray, run: eval "$(twinpath env)", and start Ray and Serve '
        "again, on every node"
    )


def haproxy_files(folder: Path, metrics_port: int, stats_port: int) -> dict[str, str]:
    """Variables that give an own HAProxy its files and ports, beside another on this machine."""
    return {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port),
    }
