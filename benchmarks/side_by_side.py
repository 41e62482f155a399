"""Applications that one Serve serves, loaded in turns at equal numbers of connections."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from rich.console import Console

from benchmarks.apart import turns
from benchmarks.wrk import Load, load
from twinpath.online.session import ServeSession


def loads(
    session: ServeSession,
    applications: Mapping[str, Mapping[str, Any]],
    paths: Mapping[str, str],
    bodies: Sequence[bytes],
    rounds: int,
    console: Console,
    *,
    connections: int,
    seconds: int,
) -> dict[str, list[Load]]:
    """Loads of each application, by name, one a round.

    ``applications`` are entries of a Serve config by name; each is deployed below ``/<name>`` and
    asked at ``/<name>`` + its path. Raises SystemExit when a request fails.
    """
    urls = deployed(session, applications, paths, bodies)
    seen: dict[str, list[Load]] = {name: [] for name in applications}
    for name in turns(tuple(applications), rounds, console):
        result = load(urls[name], list(bodies), connections, seconds)
        if result.bad:
            raise SystemExit(f"{result.bad} requests failed, {name}")
        seen[name].append(result)
    return seen


def deployed(
    session: ServeSession,
    applications: Mapping[str, Mapping[str, Any]],
    paths: Mapping[str, str],
    bodies: Sequence[bytes],
) -> dict[str, str]:
    """The addresses of applications, by name, that are served and warm. See `loads`."""
    entries = [{"name": name, "route_prefix": f"/{name}", **a} for name, a in applications.items()]
    config = session.folder / "app.yaml"
    config.write_text(yaml.safe_dump({"applications": entries}))
    session.deploy(config)
    urls = {name: f"{session.url}/{name}{paths[name]}" for name in applications}
    for name, url in urls.items():
        session.wait_until_ready(f"/{name}/readyz")
        load(url, list(bodies), 8, 2)
    return urls
