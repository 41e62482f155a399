"""What the guard's counting costs: a registered model served with and without it.

Both are served by one Serve and loaded in turns, so that the machine's drift cancels, and each has
several replicas that are loaded one by one: processes that run the same code differ by 3 %, from
where their memory lies. Recorded are scores, times and errors, by version and by carrier.
"""

from statistics import median

from rich.console import Console

from benchmarks.online.served import ROOT
from benchmarks.report import Row
from benchmarks.side_by_side import loads
from twinpath.online.session import ServeSession

#: More than other benchmarks' own default: the difference looked for is small.
ROUNDS = 5
CONNECTIONS = 32
SECONDS = 4
WAYS = ("recorded", "unrecorded")
#: Replicas of each way.
COPIES = 3


def run(rounds: int, console: Console) -> list[Row]:
    """Medians of alternated rounds, five at least. Raises SystemExit when a request fails."""
    from benchmarks import rollout_graphs

    rounds = max(rounds, ROUNDS)
    apps = [f"{way}-{copy}" for copy in range(COPIES) for way in WAYS]
    variables = {"OMP_NUM_THREADS": "1"}
    with ServeSession(num_cpus=16, pythonpath=[ROOT / "platform", ROOT], env=variables) as session:
        registry = session.folder / "registry"
        registry.mkdir()
        runtime_env = {"env_vars": {rollout_graphs.URI_VARIABLE: rollout_graphs.register(registry)}}
        seen = loads(
            session,
            {
                app: {
                    "import_path": f"benchmarks.rollout_graphs:{app.partition('-')[0]}",
                    "runtime_env": runtime_env,
                }
                for app in apps
            },
            dict.fromkeys(apps, "/predict"),
            rollout_graphs.bodies(), rounds, console, connections=CONNECTIONS, seconds=SECONDS,
        )  # fmt: skip
    ours, plain = ([one for copy in range(COPIES) for one in seen[f"{way}-{copy}"]] for way in WAYS)
    ratio = median(a.per_s / b.per_s for a, b in zip(ours, plain, strict=True))
    peer = median(one.per_s for one in plain)
    # The median of the rounds' ratios: each has both within seconds of each other.
    at = f"{CONNECTIONS} connections"
    return [
        Row(at, "req/s", ratio * peer, peer, "not recorded", ">= 0.98"),
        Row(at, "ms (p99)", median(o.p99_ms for o in ours), median(o.p99_ms for o in plain),
            "not recorded"),
    ]  # fmt: skip
