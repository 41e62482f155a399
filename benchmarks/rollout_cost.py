"""What the guard's counting costs: a registered model served with and without it.

Both are served by one Serve and loaded in turns, so that the machine's drift cancels. Recorded are
scores, times and errors, by version and by carrier.
"""

from statistics import median

import yaml
from rich.console import Console

from benchmarks.online.served import ROOT
from benchmarks.report import Row
from benchmarks.wrk import Load, load
from twinpath.online.session import ServeSession

#: A share of the rounds' own default: the difference looked for is small.
ROUNDS = 9
CONNECTIONS = 32
SECONDS = 4
WAYS = ("recorded", "unrecorded")


def run(rounds: int, console: Console) -> list[Row]:
    """Medians of alternated rounds, nine at least. Raises SystemExit when a request fails."""
    from benchmarks import rollout_graphs

    rounds = max(rounds, ROUNDS)
    seen: dict[str, list[Load]] = {way: [] for way in WAYS}
    bodies = rollout_graphs.bodies()
    variables = {"OMP_NUM_THREADS": "1"}
    with ServeSession(num_cpus=8, pythonpath=[ROOT / "platform", ROOT], env=variables) as session:
        registry = session.folder / "registry"
        registry.mkdir()
        uri = rollout_graphs.register(registry)
        applications = [
            {
                "name": way,
                "route_prefix": f"/{way}",
                "import_path": f"benchmarks.rollout_graphs:{way}",
                "runtime_env": {"env_vars": {rollout_graphs.URI_VARIABLE: uri}},
            }
            for way in WAYS
        ]
        config = session.folder / "app.yaml"
        config.write_text(yaml.safe_dump({"applications": applications}))
        session.deploy(config)
        for way in WAYS:
            session.wait_until_ready(f"/{way}/readyz")
            load(_url(session, way), bodies, 8, 2)
        for number in range(rounds):
            for way in WAYS if number % 2 == 0 else reversed(WAYS):
                with console.status(f"round {number + 1} of {rounds}: {way}"):
                    result = load(_url(session, way), bodies, CONNECTIONS, SECONDS)
                if result.bad:
                    raise SystemExit(f"{result.bad} requests failed, {way}")
                seen[way].append(result)
    ours, plain = (seen[way] for way in WAYS)
    ratio = median(a.per_s / b.per_s for a, b in zip(ours, plain, strict=True))
    peer = median(one.per_s for one in plain)
    # The median of the rounds' ratios: each has both within seconds of each other.
    at = f"{CONNECTIONS} connections"
    return [
        Row(at, "req/s", ratio * peer, peer, "not recorded", ">= 0.98"),
        Row(at, "ms (p99)", median(o.p99_ms for o in ours), median(o.p99_ms for o in plain),
            "not recorded"),
    ]  # fmt: skip


def _url(session: ServeSession, way: str) -> str:
    return f"{session.url}/{way}/predict"
