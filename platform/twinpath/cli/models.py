"""``twinpath models``: what the registry has, and which version serves."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from twinpath.registry.client import Registry

models = typer.Typer(
    help="Registered models: list and show them, and say which version serves.",
    no_args_is_help=True,
)
_Name = Annotated[str, typer.Argument(help="the registered model")]
_Uri = Annotated[
    str | None,
    typer.Option("--registry", envvar="MLFLOW_TRACKING_URI", help="MLflow's address"),
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
_Alias = Annotated[str, typer.Option(help="the alias that says what serves")]
_Force = Annotated[bool, typer.Option("--force", help="even while a rollout is under way")]


@models.command("list")
def show_all(registry: _Uri = None, as_json: _Json = False) -> None:
    """List registered models, with the versions behind their aliases."""
    with _opened(registry) as client:
        found = [
            {"model": state.name, "aliases": dict(state.aliases), "description": state.description}
            for state in client.models()
        ]
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    table = Table("model", "aliases", "description")
    for each in found:
        table.add_row(str(each["model"]), _pairs(each["aliases"]), str(each["description"]))
    Console().print(table)


@models.command()
def show(name: _Name, registry: _Uri = None, as_json: _Json = False) -> None:
    """Show a model's versions: aliases, which are kept live, which were refused and why."""
    from twinpath.registry import changes

    with _opened(registry) as client:
        found = changes.described(client, name)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    table = Table("version", "aliases", "live", "refused", "digest", title=name)
    for each in found["versions"]:
        live = "kept" if each["version"] in found["live"] else ""
        table.add_row(
            each["version"], ", ".join(each["aliases"]), live, each["refused"] or "",
            (each["digest"] or "")[:19],
        )  # fmt: skip
    Console().print(table)


@models.command()
def promote(
    name: _Name,
    version: Annotated[str, typer.Argument(help="the version that should serve")],
    alias: _Alias = "champion",
    force: _Force = False,
    registry: _Uri = None,
    as_json: _Json = False,
) -> None:
    """Let a version serve, at once and for all traffic. Replicas follow within two seconds."""
    from twinpath.registry import changes

    with _opened(registry) as client:
        _no_rollout(client, name, force)
        changes.promote(client, name, version, alias)
    _say({"model": name, "alias": alias, "version": version}, as_json,
         f"version {version} of {name!r} is its {alias}")  # fmt: skip


@models.command()
def rollback(
    name: _Name, force: _Force = False, registry: _Uri = None, as_json: _Json = False
) -> None:
    """Let the version serve again that served before the last promotion."""
    from twinpath.registry import changes

    with _opened(registry) as client:
        _no_rollout(client, name, force)
        version = changes.roll_back(client, name)
    _say({"model": name, "alias": "champion", "version": version}, as_json,
         f"version {version} of {name!r} is its champion again")  # fmt: skip


@models.command()
def pin(
    name: _Name,
    version: Annotated[str, typer.Argument(help="the version to keep live")],
    off: Annotated[bool, typer.Option("--off", help="let it go again")] = False,
    registry: _Uri = None,
    as_json: _Json = False,
) -> None:
    """Keep a version live beside what serves, so that requests may ask for it."""
    from twinpath.registry import changes

    with _opened(registry) as client:
        kept = changes.pin(client, name, version, keep=not off)
    _say({"model": name, "live": kept}, as_json,
         f"kept live beside what serves of {name!r}: {', '.join(kept) or 'none'}")  # fmt: skip


def _no_rollout(client: "Registry", name: str, force: bool) -> None:
    """Raises ConfigError while a rollout moves the model's traffic, unless forced."""
    from twinpath.errors import ConfigError
    from twinpath.rollout.state import RolloutState

    text = client.state(name).rollout
    if text is not None and not force and RolloutState.from_tag(text).live:
        raise ConfigError(
            f"a rollout of {name!r} is under way: promote or abort it with `twinpath rollout`, or "
            "use --force, of which the rollout does not know"
        )


def _say(done: dict[str, Any], as_json: bool, text: str) -> None:
    typer.echo(json.dumps(done, indent=2) if as_json else text)


def _pairs(aliases: Any) -> str:
    return ", ".join(f"{alias} → {version}" for alias, version in aliases.items())


@contextmanager
def _opened(uri: str | None) -> "Iterator[Registry]":
    from twinpath.registry.client import Registry

    # A person waits longer than a replica does.
    client = Registry(uri, timeout_s=30)
    try:
        yield client
    finally:
        client.close()
