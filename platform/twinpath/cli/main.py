"""Commands. Each loads what it needs when it runs, so that ``--help`` is quick."""

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from twinpath.cli.features import features
from twinpath.cli.keys import keys
from twinpath.cli.memory import plan_memory
from twinpath.cli.models import models
from twinpath.cli.rollout import rollout
from twinpath.cli.tls import dev_cert, edge
from twinpath.errors import TwinpathError

app = typer.Typer(
    name="twinpath",
    help="Write a model graph once; serve it online, score it offline.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(keys, name="keys")
app.add_typer(features, name="features")
app.add_typer(models, name="models")
app.add_typer(rollout, name="rollout")
app.command("dev-cert")(dev_cert)
app.command("edge")(edge)
app.command("plan-memory")(plan_memory)

GraphPath = Annotated[
    str, typer.Argument(metavar="MODULE:GRAPH", help="For example graphs.flights:graph.")
]


def main() -> None:
    """Entry point of the ``twinpath`` command."""
    with _errors_as_text():
        app()


@contextmanager
def _errors_as_text() -> Iterator[None]:
    """An error of ours is a line on stderr and exit status 2, not a traceback."""
    try:
        yield
    except TwinpathError as error:
        console = Console(stderr=True, soft_wrap=True, highlight=False)
        console.print("error:", style="bold red", end=" ")
        console.print(f"{error} [{error.code}]", markup=False)
        raise SystemExit(2) from None


@app.command()
def explain(
    path: GraphPath,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Show stages, edges, the columns that cross processes, and what each stage becomes."""
    from twinpath.cli.loading import load_graph
    from twinpath.cli.report import print_explanation
    from twinpath.graph.explain import explain as explain_plan

    with _errors_as_text():
        explanation = explain_plan(load_graph(path).plan)
    if as_json:
        typer.echo(json.dumps(explanation.as_dict(), indent=2))
    else:
        print_explanation(explanation, Console())


@app.command()
def draw(
    path: GraphPath,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A file ending in .svg or .mmd.")
    ] = Path("graph.svg"),
) -> None:
    """Draw a graph as an SVG picture or as Mermaid text."""
    from twinpath.cli.loading import load_graph

    with _errors_as_text():
        written = load_graph(path).draw().save(output)
    typer.echo(f"wrote {written}")


@app.command()
def env() -> None:
    """Print what to set before `ray start` or `serve run`: eval "$(twinpath env)"."""
    from twinpath.online.environment import FAST_PATH

    for name, value in FAST_PATH.items():
        typer.echo(f"export {name}={shlex.quote(value)}")


@app.command()
def version() -> None:
    """Print the version."""
    from twinpath import __version__

    typer.echo(__version__)
