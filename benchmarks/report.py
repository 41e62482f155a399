"""What a benchmark reports: rows, a table, a JSON file and a plot."""

import datetime as dt
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib as mpl
import psutil
from rich.console import Console
from rich.table import Table

from twinpath.nodes.llm_memory import card_bytes

RESULTS = Path(__file__).parent / "results"
_TARGET = re.compile(r"^(>=|<=|<|>) ([\d.]+)$")


@dataclass(frozen=True)
class Row:
    """One figure of ours beside the peer's. ``target`` is about the ratio, such as ``>= 5``."""

    metric: str
    unit: str
    ours: float
    peer: float
    peer_name: str
    target: str | None = None

    @property
    def ratio(self) -> float:
        """Ours divided by the peer's."""
        return self.ours / self.peer

    @property
    def met(self) -> bool | None:
        """Whether the ratio meets the target; None without one."""
        if self.target is None:
            return None
        found = _TARGET.match(self.target)
        if found is None:
            raise ValueError(f"target {self.target!r}: expected an operator and a number, '>= 5'")
        wanted = float(found[2])
        return {
            ">=": self.ratio >= wanted,
            "<=": self.ratio <= wanted,
            ">": self.ratio > wanted,
            "<": self.ratio < wanted,
        }[found[1]]

    def as_dict(self) -> dict[str, Any]:
        """The row as it stands in the JSON file."""
        return asdict(self) | {"ratio": self.ratio, "met": self.met}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        **({"gpu": card} if (card := _card()) else {}),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("ray", "numpy", "scikit-learn")},
    }


def _card() -> str | None:
    """The first GPU's name by NVML, where there is one."""
    if card_bytes() is None:
        return None
    import pynvml

    pynvml.nvmlInit()
    return str(pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0)))


def publish(
    name: str,
    rows: list[Row],
    console: Console,
    *,
    beside: Mapping[str, Any] | None = None,
    folder: Path | None = None,
    picture: bool = True,
    shown: Sequence[Row] | None = None,
) -> Path:
    """Print the table, write ``results/NAME.json`` and ``NAME.png``; the JSON's path.

    ``beside`` are further keys of the JSON document; without ``picture`` there is no plot;
    ``shown`` is what the table has, where all rows are too many.
    """
    table = Table("metric", "unit", "ours", "peer", "peer is", "ratio", "target", "met", title=name)
    for row in rows if shown is None else shown:
        met = {None: "", True: "[green]yes[/]", False: "[red]no[/]"}[row.met]
        table.add_row(
            row.metric, row.unit, f"{row.ours:,.4g}", f"{row.peer:,.4g}", row.peer_name,
            f"{row.ratio:.3g}", row.target or "", met,
        )  # fmt: skip
    console.print(table)
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    document = {
        "name": name,
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "rows": [row.as_dict() for row in rows],
        **(beside or {}),
    }
    path.write_text(json.dumps(document, indent=2) + "\n")
    if picture:
        plot(name, rows, path.with_suffix(".png"))
    return path


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def plot(name: str, rows: list[Row], path: Path) -> None:
    """Bars of ours and the peer's, a panel for each unit."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    units = list(dict.fromkeys(row.unit for row in rows))
    figure, panels = plt.subplots(
        1, len(units), figsize=(1.2 + 5.2 * len(units), 4.6), squeeze=False, layout="constrained"
    )
    for panel, unit in zip(panels[0], units, strict=True):
        chosen = [row for row in rows if row.unit == unit]
        for shift, (label, colour) in enumerate((("Twinpath", "#1f6feb"), ("peer", "#b8bfc8"))):
            values = [row.ours if shift == 0 else row.peer for row in chosen]
            places = [i + 0.4 * shift for i in range(len(chosen))]
            bars = panel.bar(places, values, 0.38, label=label, color=colour)
            panel.bar_label(bars, [_short(value) for value in values], fontsize=8, padding=2)
        labels = [row.metric.replace(", ", "\n") for row in chosen]
        panel.set_xticks([i + 0.2 for i in range(len(chosen))], labels, fontsize=8)
        panel.set_ylabel(unit)
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(y=0.15)
        if len(chosen) == 1:
            panel.set_xlim(-0.8, 1.2)
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    panels[0][0].legend(frameon=False)
    peers = ", ".join(dict.fromkeys(row.peer_name for row in rows))
    figure.suptitle(f"{name}   (peer: {peers})", fontsize=11)
    figure.savefig(path, dpi=130)
    plt.close(figure)
