"""``twinpath keys``: the file of hashed API keys that a served graph's gateway reads."""

import datetime as dt
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

keys = typer.Typer(help="API keys of the gateway, hashed in a file.", no_args_is_help=True)
_File = Annotated[Path, typer.Argument(help="the file that args.gateway.api_keys names")]


@keys.command()
def new(
    file: _File,
    principal: Annotated[str, typer.Option(help="who will use it")],
    graph: Annotated[list[str] | None, typer.Option(help="a graph it opens; default all")] = None,
    priority: Annotated[str, typer.Option(help="low, normal or high, at most")] = "normal",
    days: Annotated[float | None, typer.Option(help="until it expires; default never")] = None,
    rate: Annotated[str | None, typer.Option(help="its own limit, such as 100/second")] = None,
    quota: Annotated[str | None, typer.Option(help="its own quota, such as 50000/day")] = None,
    admin: Annotated[bool, typer.Option(help="it may use the admin API of these graphs")] = False,
) -> None:
    """Make a key and print it, once: the file holds only its hash."""
    from pydantic import ValidationError

    from twinpath.online.gateway.keys import new_key, read_keys, write_keys

    if priority not in ("low", "normal", "high"):
        raise typer.BadParameter(f"priority {priority!r}: expected low, normal or high")
    expires = None if days is None else dt.datetime.now(dt.UTC) + dt.timedelta(days=days)
    graphs = tuple(graph or ["*"])
    try:
        key, record = new_key(
            principal, graphs, priority, expires, rate, quota,  # type: ignore[arg-type]  # checked above
            admin=admin,
        )  # fmt: skip
    except ValidationError as error:
        wrong = error.errors()[0]
        raise typer.BadParameter(f"{wrong['loc'][0]}: {wrong['msg']}") from None
    write_keys(file, [*(read_keys(file) if file.exists() else []), record])
    typer.echo(key)


@keys.command("list")
def show(file: _File) -> None:
    """List the keys of a file; the keys themselves are nowhere."""
    from twinpath.online.gateway.keys import read_keys

    table = Table("id", "principal", "graphs", "priority", "expires", "limits")
    for record in read_keys(file):
        expires = record.expires.isoformat(timespec="minutes") if record.expires else "never"
        graphs = ", ".join(record.graphs)
        limits = ", ".join(limit for limit in (record.rate, record.quota) if limit)
        graphs += ", admin" if record.admin else ""
        table.add_row(record.id, record.principal, graphs, record.priority, expires, limits)
    Console().print(table)


@keys.command()
def revoke(file: _File, key_id: Annotated[str, typer.Argument(help="from `keys list`")]) -> None:
    """Take a key out; servers stop accepting it within a second."""
    from twinpath.errors import ConfigError, did_you_mean
    from twinpath.online.gateway.keys import read_keys, write_keys

    records = read_keys(file)
    kept = [record for record in records if record.id != key_id]
    if len(kept) == len(records):
        known = did_you_mean(key_id, [record.id for record in records])
        raise ConfigError(f"no key {key_id!r} in {file}.{known}")
    write_keys(file, kept)


@keys.command()
def rotate(
    file: _File,
    key_id: Annotated[str, typer.Argument(help="from `keys list`")],
    hours: Annotated[float, typer.Option(min=0, help="that the old key still opens")] = 24.0,
) -> None:
    """Make a new key in the place of another, print it once, and let the old one end."""
    from twinpath.online.gateway.keys import read_keys, replace_key, write_keys

    old_until = dt.datetime.now(dt.UTC) + dt.timedelta(hours=hours)
    key, records = replace_key(read_keys(file), key_id, old_until)
    write_keys(file, records)
    typer.echo(key)
