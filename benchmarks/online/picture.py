"""The plot of the online benchmark: requests a second of every server, by workload."""

from pathlib import Path

import matplotlib as mpl
from matplotlib.ticker import NullFormatter

from benchmarks.online.figures import Measured
from benchmarks.online.peers import OURS, SERVERS

_COLOURS = {
    OURS: "#1f6feb", "triton": "#76b900", "litserve": "#8250df", "mlserver": "#bf8700",
    "kserve": "#cf222e", "bentoml": "#d4679a", "mlflow": "#0a7e8c", "serve": "#8b949e",
}  # fmt: skip
_COLUMNS = 2
_FLOOR = 10.0


def plot(measured: Measured, path: Path) -> None:
    """A panel for each workload: bars by connections, on a logarithmic scale, since servers are
    up to a hundred times apart."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    workloads = measured.workloads()
    lines = -(-len(workloads) // _COLUMNS)
    figure, panels = plt.subplots(
        lines, _COLUMNS, figsize=(15, 1.3 + 3.7 * lines), squeeze=False, layout="constrained"
    )
    connections = measured.connections()
    for panel, workload in zip(panels.flat, workloads, strict=False):
        names = [
            name for name in measured.servers(workload)
            if any(measured.median(workload, name, c, "per_s") for c in connections)
        ]  # fmt: skip
        width = 0.86 / max(len(names), 1)
        for shift, name in enumerate(names):
            values = [measured.median(workload, name, c, "per_s") or 0.0 for c in connections]
            places = [i + (shift - (len(names) - 1) / 2) * width for i in range(len(values))]
            bars = panel.bar(places, values, width * 0.94, color=_COLOURS[name])
            labels = [_short(value) for value in values]
            panel.bar_label(bars, labels, fontsize=7, padding=2, rotation=90)
        panel.set_yscale("log")
        # Bars on a logarithmic scale start where we say: at a power of ten, everywhere the same.
        panel.set_ylim(_FLOOR, panel.get_ylim()[1] * 3)
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.set_xticks(range(len(connections)), [str(c) for c in connections])
        panel.set_xlabel("connections", fontsize=9)
        panel.set_ylabel("req/s", fontsize=9)
        panel.set_title(workload, loc="left", fontsize=11, fontweight="bold")
        panel.spines[["top", "right"]].set_visible(False)
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    for panel in panels.flat[len(workloads) :]:
        panel.set_visible(False)
    shown = [name for name in SERVERS if any(name in measured.servers(w) for w in workloads)]
    patches = [plt.Rectangle((0, 0), 1, 1, color=_COLOURS[name]) for name in shown]
    figure.legend(
        patches, [SERVERS[name].title for name in shown], loc="outside upper center",
        ncols=min(len(shown), 4), frameon=False, fontsize=10,
        title=f"requests a second (logarithmic scale), medians over rounds: {measured.rounds()}",
    )  # fmt: skip
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _short(value: float) -> str:
    if not value:
        return ""
    return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.0f}"
