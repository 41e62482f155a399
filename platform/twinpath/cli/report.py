"""An explanation as tables on the terminal."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from twinpath.graph.explain import Explanation, StageRow


def print_explanation(explanation: Explanation, console: Console) -> None:
    """Print stages, edges, crossings and dead columns."""
    nodes = sum(len(stage.nodes) for stage in explanation.stages)
    console.print(
        Text.assemble(
            ("graph ", "dim"),
            (explanation.graph, "bold"),
            (f"  nodes: {nodes}, stages: {len(explanation.stages)}", "dim"),
        )
    )
    console.print(_stages(explanation))
    console.print(_edges(explanation))
    if explanation.crossings:
        console.print(_crossings(explanation))
    else:
        console.print("Nothing crosses a process edge: every node is fused into the ingress.")
    if explanation.dead_inputs:
        names = ", ".join(explanation.dead_inputs)
        console.print(Text(f"Dropped at the edge, as nothing reads them: {names}"))


def _table(title: str, *headings: str) -> Table:
    table = Table(title=f"\n{title}", title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _stages(explanation: Explanation) -> Table:
    table = _table("Stages", "#", "nodes", "replicas", "batch", "online", "offline")
    for stage in explanation.stages:
        table.add_row(
            str(stage.index + 1),
            Text(", ".join(stage.nodes), style="yellow" if stage.placed else "cyan"),
            *_scale(stage),
            Text(stage.online),
            Text(stage.offline),
        )
    return table


def _scale(stage: StageRow) -> tuple[str, str]:
    low, high = stage.replicas
    replicas = str(low) if low == high else f"{low}–{high}, queue {stage.target_queue:g}"
    wait = f", wait {stage.max_wait_ms:g} ms" if stage.max_wait_ms else ""
    return replicas, f"≤ {stage.max_batch} rows{wait}"


def _edges(explanation: Explanation) -> Table:
    table = _table("Edges", "from", "to", "rows")
    for edge in explanation.edges:
        table.add_row(Text(edge.source), Text(edge.target), Text(edge.where or "all"))
    return table


def _crossings(explanation: Explanation) -> Table:
    table = _table("Columns that cross to a process of their own", "node", "sends", "returns")
    for crossing in explanation.crossings:
        sends = _names(crossing.sends)
        if crossing.hint:
            sends.append(f" {crossing.hint}", style="dim")
        table.add_row(Text(crossing.node), sends, _names(crossing.returns))
    return table


def _names(names: tuple[str, ...] | None) -> Text:
    if names is None:
        return Text("(all)", style="yellow")
    return Text(", ".join(names) or "(none)")
