"""What the guard's counting costs: a registered model served with and without it.

The same replicas record in one turn and do not in the next, since processes that run the same code
differ by 3 %, from where their memory lies. Recorded are scores, times and errors, by version and
by carrier, and the scores that wait for labels.
"""

from statistics import median

from rich.console import Console

from benchmarks.apart import turns
from benchmarks.online.served import ROOT
from benchmarks.report import Row
from benchmarks.side_by_side import deployed
from benchmarks.wrk import Load, load
from twinpath.online.session import ServeSession

#: More than other benchmarks' own default: the difference looked for is small.
ROUNDS = 5
CONNECTIONS = 32
SECONDS = 4
WAYS = ("recorded", "unrecorded")
#: Replicas, each an application of its own.
COPIES = 3


def run(rounds: int, console: Console) -> list[Row]:
    """Medians of alternated rounds, five at least. Raises SystemExit when a request fails."""
    from benchmarks import rollout_graphs

    rounds = max(rounds, ROUNDS)
    apps = [f"copy-{number}" for number in range(COPIES)]
    bodies = rollout_graphs.bodies()
    seen: dict[str, list[Load]] = {way: [] for way in WAYS}
    variables = {"OMP_NUM_THREADS": "1"}
    with ServeSession(num_cpus=16, pythonpath=[ROOT / "platform", ROOT], env=variables) as session:
        registry, switch = session.folder / "registry", session.folder / "records"
        registry.mkdir()
        variables = {
            rollout_graphs.URI_VARIABLE: rollout_graphs.register(registry),
            rollout_graphs.SWITCH_VARIABLE: str(switch),
        }
        entry = {
            "import_path": "benchmarks.rollout_graphs:app",
            "runtime_env": {"env_vars": variables},
        }
        entries = dict.fromkeys(apps, entry)
        urls = deployed(session, entries, dict.fromkeys(apps, "/predict"), bodies)
        for url in urls.values():
            for way in turns(WAYS, rounds, console):
                if way == "recorded":
                    switch.touch()
                else:
                    switch.unlink(missing_ok=True)
                result = load(url, bodies, CONNECTIONS, SECONDS)
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
