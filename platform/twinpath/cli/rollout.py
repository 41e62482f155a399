"""``twinpath rollout``: move traffic to a challenger, and see how it does."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from twinpath.cli.operate import URL, operate

rollout = typer.Typer(
    help="Rollouts of registered models, in the registry itself or over a server's admin API "
    "(--url; the key is read from TWINPATH_API_KEY).",
    no_args_is_help=True,
)

_Model = Annotated[str, typer.Argument(help="the registered model's name")]
_Url = Annotated[
    str | None, typer.Option("--url", envvar=URL, help="a served graph, for its admin API")
]
_Registry = Annotated[
    str | None,
    typer.Option("--tracking-uri", help="MLflow's; default MLFLOW_TRACKING_URI"),
]
_Json = Annotated[bool, typer.Option("--json", help="print JSON, for programs")]
_Reason = Annotated[str, typer.Option(help="goes to the audit log")]
_Graph = Annotated[str, typer.Argument(metavar="MODULE:GRAPH", help="graphs.flights:graph")]


@rollout.command()
def start(
    model: _Model,
    challenger: Annotated[str, typer.Argument(help="the version to roll out")],
    kind: Annotated[str, typer.Option(help="canary, shadow or ab")] = "canary",
    steps: Annotated[
        str | None, typer.Option(help="shares, such as 0.05,0.25,0.5,1 (the default)")
    ] = None,
    shadow_first: Annotated[
        float, typer.Option(help="share of rows mirrored before a canary's first step")
    ] = 0.0,
    key: Annotated[
        list[str] | None, typer.Option(help="column that keeps a row with its version")
    ] = None,
    segment: Annotated[
        list[str] | None, typer.Option(help="column by whose values it is judged too")
    ] = None,
    minimum_samples: Annotated[int, typer.Option(min=1, help="rows in each step")] = 1000,
    minimum_time: Annotated[float, typer.Option(min=0, help="seconds in each step")] = 60.0,
    threshold: Annotated[
        list[str] | None, typer.Option(help="such as psi=0.2 or error_rate=0.01")
    ] = None,
    alias: Annotated[str, typer.Option(help="the alias that says what serves")] = "champion",
    again: Annotated[bool, typer.Option(help="although that version was refused")] = False,
    require: Annotated[
        list[str] | None, typer.Option(help="a report that it must have: backtest, loadtest")
    ] = None,
    reason: _Reason = "",
    url: _Url = None,
    tracking_uri: _Registry = None,
    as_json: _Json = False,
) -> None:
    """Start a rollout of a version over the one that serves."""
    asked: dict[str, Any] = {
        "challenger": challenger, "kind": kind, "shadow_first": shadow_first, "alias": alias,
        "segments": segment or [], "minimum_samples": minimum_samples,
        "minimum_time_s": minimum_time, "again": again, "reason": reason,
        "thresholds": dict(map(_pair, threshold or [])),
    }  # fmt: skip
    if steps is not None:
        asked["steps"] = [_number(step, "--steps") for step in steps.split(",")]
    if key:
        asked["key"] = key
    found = operate(
        "start", {"model": model, "rollout": asked},
        url=url, tracking_uri=tracking_uri, require=require or (),
    )  # fmt: skip
    _show(found, as_json)


@rollout.command()
def status(
    model: _Model, url: _Url = None, tracking_uri: _Registry = None, as_json: _Json = False
) -> None:
    """Show the rollout under way, or the last one, and every version with its reports."""
    _show(operate("status", {"model": model}, url=url, tracking_uri=tracking_uri), as_json)


@rollout.command()
def history(
    model: _Model, url: _Url = None, tracking_uri: _Registry = None, as_json: _Json = False
) -> None:
    """Show the audit log of a model's rollouts: what was decided, by whom, on what evidence."""
    from twinpath.cli.rollout_report import print_history

    found = operate("history", {"model": model}, url=url, tracking_uri=tracking_uri)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        print_history(found["history"], Console())


def _commanding(name: str, text: str) -> None:
    def command(
        model: _Model,
        reason: _Reason = "",
        url: _Url = None,
        tracking_uri: _Registry = None,
        as_json: _Json = False,
    ) -> None:
        given = {"model": model, "reason": reason}
        _show(operate(name, given, url=url, tracking_uri=tracking_uri), as_json)

    command.__doc__ = text
    rollout.command(name)(command)


for _name, _text in (
    ("pause", "Hold the rollout at its step; the guard still rolls back."),
    ("resume", "Go on after a pause; the step's time begins anew."),
    ("promote", "End the rollout now, in the challenger's favour."),
    ("rollback", "End the rollout now and refuse the challenger."),
    ("abort", "End the rollout now, with nothing said against the challenger."),
):
    _commanding(_name, _text)


@rollout.command()
def backtest(
    graph: _Graph,
    data: Annotated[Path, typer.Option(help="Parquet or CSV with the graph's input columns")],
    challenger: Annotated[str, typer.Option(help="the version to judge")],
    incumbent: Annotated[
        str | None, typer.Option(help="the version to compare with; default: what serves")
    ] = None,
    model: Annotated[str | None, typer.Option(help="if the graph has several")] = None,
    segment: Annotated[list[str] | None, typer.Option(help="column to judge by as well")] = None,
    label: Annotated[str | None, typer.Option(help="column with 0 and 1, what came true")] = None,
    threshold: Annotated[list[str] | None, typer.Option(help="such as psi=0.2")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="a folder for the report")] = Path(
        "backtest"
    ),
    workers: Annotated[int, typer.Option(min=1, help="actors; each holds both versions")] = 1,
    keep: Annotated[bool, typer.Option(help="keep the verdict with the version, as a gate")] = True,
    as_json: _Json = False,
) -> None:
    """Score rows with incumbent and challenger on Ray Data, and compare."""
    from twinpath.cli.rollout_checks import run_backtest
    from twinpath.cli.rollout_report import print_backtest

    found = run_backtest(
        graph, data, challenger, incumbent=incumbent, model=model, segments=segment or [],
        label=label, thresholds=dict(map(_pair, threshold or [])), output=output,
        workers=workers, keep=keep,
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        print_backtest(found, Console())
    raise typer.Exit(0 if found["passed"] else 1)


@rollout.command()
def loadtest(
    graph: _Graph,
    data: Annotated[Path, typer.Option(help="Parquet or CSV with the graph's input columns")],
    challenger: Annotated[str, typer.Option(help="the version to judge")],
    incumbent: Annotated[
        str | None, typer.Option(help="the version to compare with; default: what serves")
    ] = None,
    model: Annotated[str | None, typer.Option(help="if the graph has several")] = None,
    clients: Annotated[int, typer.Option(min=1, help="that each wait for their answer")] = 8,
    rows: Annotated[int, typer.Option(min=1, help="in a request")] = 8,
    seconds: Annotated[float, typer.Option(min=0.1, help="for both versions together")] = 10.0,
    ratio: Annotated[float, typer.Option(min=1, help="of the p99s that still passes")] = 1.5,
    output: Annotated[Path, typer.Option("--output", "-o", help="a folder for the report")] = Path(
        "loadtest"
    ),
    keep: Annotated[bool, typer.Option(help="keep the verdict with the version, as a gate")] = True,
    as_json: _Json = False,
) -> None:
    """Let clients ask incumbent and challenger in this process, and compare their times."""
    from twinpath.cli.rollout_checks import run_loadtest
    from twinpath.cli.rollout_report import print_loadtest

    found = run_loadtest(
        graph, data, challenger, incumbent=incumbent, model=model, clients=clients, rows=rows,
        seconds=seconds, ratio=ratio, output=output, keep=keep,
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        print_loadtest(found, Console())
    raise typer.Exit(0 if found["passed"] else 1)


def _show(found: dict[str, Any], as_json: bool) -> None:
    from twinpath.cli.rollout_report import print_status

    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        print_status(found, Console())


def _pair(text: str) -> tuple[str, float]:
    name, equals, value = text.partition("=")
    if not equals:
        raise typer.BadParameter(f"--threshold {text!r}: expected name=value, such as psi=0.2")
    return name.strip(), _number(value, "--threshold")


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{option}: {text!r} is no number") from None
