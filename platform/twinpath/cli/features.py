"""``twinpath features``: apply, fill, look at and check a feature repository."""

import datetime as dt
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from twinpath.features.repo import FeatureRepo
    from twinpath.features.skew import FeatureSkew

features = typer.Typer(help="Features: definitions, the online store, skew.", no_args_is_help=True)
_Repo = Annotated[
    Path, typer.Option("--repo", "-r", help="folder with feature_store.yaml and definitions")
]
_Json = Annotated[bool, typer.Option("--json", help="print JSON, for programs")]
_Moment = Annotated[str | None, typer.Option(help="ISO 8601, UTC unless it says otherwise")]
HERE = Path()


@features.command()
def apply(repo: _Repo = HERE, as_json: _Json = False) -> None:
    """Read the definitions in the repository's Python files and write them to its registry."""
    from twinpath.features.definitions import apply as apply_definitions
    from twinpath.features.definitions import read_definitions
    from twinpath.features.feast_import import feast_

    feast_(checked=True)
    opened = _open(repo)
    applied = apply_definitions(opened, read_definitions(repo.absolute()))
    if as_json:
        typer.echo(json.dumps(asdict(applied)))
        return
    table = Table("kind", "applied")
    for kind, names in asdict(applied).items():
        table.add_row(kind.replace("_", " "), ", ".join(names) or "none")
    Console().print(table)


@features.command()
def materialize(
    repo: _Repo = HERE,
    end: _Moment = None,
    start: _Moment = None,
    view: Annotated[list[str] | None, typer.Option(help="only this view; may be repeated")] = None,
    as_json: _Json = False,
) -> None:
    """Write the newest row of each key to the online store, from where the last run ended."""
    from twinpath.features.materialise import materialise

    opened = _open(repo)
    times = {"end": _moment("--end", end), "start": _moment("--start", start)}
    with _progress(quiet=as_json) as tell:
        done = materialise(opened, **times, views=view or None, progress=tell)
    if as_json:
        typer.echo(json.dumps([_plain(asdict(each)) for each in done]))
        return
    table = Table("view", "from", "to", "keys", "written", "seconds")
    for each in done:
        table.add_row(
            each.view, _shown(each.start), _shown(each.end), f"{each.rows:,}",
            f"{each.written:,}", f"{each.duration_s:.2f}",
        )  # fmt: skip
    Console().print(table)


@features.command()
def push(
    view: Annotated[str, typer.Argument(help="a feature view")],
    file: Annotated[
        Path, typer.Argument(help="rows: .parquet (or a folder of it), .jsonl, or - for JSON lines")
    ],
    repo: _Repo = HERE,
    as_json: _Json = False,
) -> None:
    """Write rows to the online store, now. Newer rows that are there already stay."""
    from twinpath.features.sink import FeatureSink

    opened = _open(repo)
    if file.suffix == ".parquet" or file.is_dir():
        import pyarrow.dataset as ds

        _must_exist(file)
        sink = FeatureSink(view, opened)
        sink.check(ds.dataset(str(file), format="parquet").schema.names)
        rows = sink.write(file)
    else:
        rows = _push_lines(opened, view, file)
    typer.echo(json.dumps({"view": view, "rows": rows}) if as_json else f"{rows:,} rows → {view}")


@features.command()
def show(
    service: Annotated[str | None, typer.Argument(help="a feature service; default: all")] = None,
    repo: _Repo = HERE,
    as_json: _Json = False,
) -> None:
    """Show services, their views, keys, times to live, and how far they are materialised."""
    opened = _open(repo)
    names = [service] if service else sorted(s.name for s in opened.store.list_feature_services())
    found = [_service(opened, name) for name in names]
    if as_json:
        typer.echo(json.dumps(found))
        return
    console = Console()
    if not found:
        console.print("No feature services yet: twinpath features apply")
    for each in found:
        table = Table(
            "view", "keys", "features", "time to live", "materialised to",
            title=each["service"], title_justify="left",
        )  # fmt: skip
        for view in each["views"]:
            ttl = "for ever" if view["ttl_s"] is None else str(dt.timedelta(seconds=view["ttl_s"]))
            table.add_row(
                view["view"], ", ".join(view["keys"]),
                ", ".join(f"{name}: {kind}" for name, kind in view["features"].items()),
                "on demand" if view["on_demand"] else ttl,
                "" if view["on_demand"] else view["materialised_to"] or "never",
            )  # fmt: skip
        console.print(table)


@features.command()
def skew(
    captured: Annotated[Path, typer.Argument(help="a lookup's folder below args.features.capture")],
    repo: Annotated[
        Path | None, typer.Option("--repo", "-r", help="default: the one that was captured from")
    ] = None,
    min_equal: Annotated[float, typer.Option(min=0, max=1, help="share of equal rows")] = 0.99,
    max_psi: Annotated[float, typer.Option(min=0, help="population stability index")] = 0.2,
    tolerance: Annotated[float, typer.Option(min=0, help="relative, for equal numbers")] = 0.0,
    as_json: _Json = False,
) -> None:
    """Compute captured rows again as of their moments, and compare. Exit status 1: they differ."""
    from twinpath.errors import ConfigError
    from twinpath.features.capture_rows import columns_of
    from twinpath.features.skew import measure_skew
    from twinpath.observe.capture import read_capture

    about, table = read_capture(captured)
    folder = repo or (Path(about["repo"]) if about.get("repo") else None)
    if folder is None:
        raise ConfigError("the capture does not name its feature repository: pass --repo")
    opened = _open(folder)
    rows, moments = columns_of(table)
    report = measure_skew(
        opened, about["service"], rows, moments,
        on_missing=about["on_missing"], defaults=about["defaults"],
        full_names=about["full_names"], min_equal=min_equal, max_psi=max_psi, tolerance=tolerance,
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(report.as_dict()))
    else:
        console = Console()
        shown = Table(
            "feature", "equal", "max difference", "PSI", "Wasserstein", "missing online / offline",
            "", title=f"{report.service}: {report.rows:,} captured rows", title_justify="left",
        )  # fmt: skip
        for each in report.features:
            shown.add_row(*_skew_row(each))
        console.print(shown)
        if report.skewed:
            console.print(f"[red]skewed:[/] {', '.join(report.skewed)}")
    if report.skewed:
        raise typer.Exit(1)


def _open(repo: Path) -> "FeatureRepo":
    """The repository; a folder that is none is refused at once."""
    from twinpath.features.repo import FeatureRepo

    opened = FeatureRepo(repo.absolute())
    _ = opened.store
    return opened


def _moment(option: str, text: str | None) -> dt.datetime | None:
    if text is None:
        return None
    try:
        return dt.datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(
            f"{option} {text!r}: expected ISO 8601, for example 2013-12-23T17:00:00Z"
        ) from None


@contextmanager
def _progress(quiet: bool) -> Iterator[Any]:
    """A bar for each view on a terminal; nothing where a program reads the output."""
    if quiet:
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def tell(view: str, done: int, total: int) -> None:
            if view not in tasks:
                tasks[view] = bars.add_task(view, total=total)
            bars.update(tasks[view], completed=done)

        yield tell


def _must_exist(file: Path) -> None:
    from twinpath.errors import ConfigError

    if not file.exists():
        raise ConfigError(f"{file} does not exist")


def _push_lines(opened: "FeatureRepo", view: str, file: Path) -> int:
    """Rows of JSON lines, all checked before any is written."""
    import time

    from twinpath.errors import InputError
    from twinpath.features.pushed_rows import RowCheck
    from twinpath.features.writing import ViewWriter

    if str(file) != "-":
        _must_exist(file)
    text = sys.stdin.read() if str(file) == "-" else file.read_text()
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise InputError(f"{file}, line {number}: no JSON: {error}") from None
    writer = ViewWriter(opened, view)
    writer.write(RowCheck(writer).store_rows(rows, time.time()))
    return len(rows)


def _service(opened: "FeatureRepo", name: str) -> dict[str, Any]:
    from twinpath.features.materialise import last_end

    spec = opened.service(name)
    views: list[dict[str, Any]] = []
    for view in spec.views:
        end = last_end(opened, view.name)
        views.append(
            {
                "view": view.title, "keys": list(view.entity_keys), "features": dict(view.features),
                "ttl_s": view.ttl_s, "on_demand": False, "source": view.source_path,
                "materialised_to": None if end is None else end.isoformat(),
            }
        )  # fmt: skip
    for each in spec.on_demand:
        views.append(
            {
                "view": each.name, "keys": list(each.request), "features": dict(each.features),
                "ttl_s": None, "on_demand": True, "source": None, "materialised_to": None,
            }
        )  # fmt: skip
    return {"service": name, "views": views}


def _skew_row(each: "FeatureSkew") -> tuple[str, ...]:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.4g}"

    return (
        each.feature, f"{each.equal:.2%}", number(each.max_difference), f"{each.psi:.3f}",
        number(each.wasserstein), f"{each.missing_online:.1%} / {each.missing_offline:.1%}",
        "[red]skewed[/]" if each.skewed else "[green]ok[/]",
    )  # fmt: skip


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v.isoformat() if isinstance(v, dt.datetime) else v for k, v in values.items()}


def _shown(moment: dt.datetime | None) -> str:
    return "the first row" if moment is None else f"{moment:%Y-%m-%d %H:%M}"
