"""Pictures of a backtest. Needs matplotlib, which the extra ``loadtest`` brings."""

import io
import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np

from twinpath.errors import MissingExtraError
from twinpath.rollout.backtest import Backtest, BacktestReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE, _ORANGE, _GREY = "#1f6feb", "#d1600a", "#b8bfc8"
#: Segments in the picture: the worst ones.
_SEGMENTS = 16


def picture(backtest: Backtest, report: BacktestReport) -> bytes:
    """A PNG of four panels: both distributions, paired scores, calibration, segments.

    Raises MissingExtraError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "loadtest") from None
    figure = Figure(figsize=(11, 8), layout="constrained")
    panels = figure.subplots(2, 2)
    _scores(panels[0][0], backtest)
    _paired(panels[0][1], backtest)
    _calibration(panels[1][0], backtest)
    _segments(panels[1][1], backtest, report)
    for panel in panels.ravel():
        panel.spines[["top", "right"]].set_visible(False)
    verdict = "passed" if report.passed else f"failed: {report.reasons[0]}"
    title = f"version {report.challenger} against {report.incumbent}, {report.rows:,} rows: "
    figure.suptitle(textwrap.shorten(title + verdict, 130, placeholder=" …"), fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _ticks(panel: "Axes", backtest: Backtest, axis: str) -> None:
    """Scores at the edges of some bins, as the bins are not evenly wide; unused ones are cut."""
    used = np.flatnonzero(sum(counts for counts, _, _ in backtest.curves().values()))
    low, high = int(used.min(initial=backtest.bins.count - 1)), int(used.max(initial=0))
    getattr(panel, f"set_{axis}lim")(low - 1, high + 1)
    edges = backtest.edges()
    if not len(edges):
        return
    at = np.unique(np.linspace(low, min(high, len(edges)) - 1, 7).astype(int).clip(0))
    labels = [f"{edges[i]:.3g}" for i in at]
    getattr(panel, f"set_{axis}ticks")(at + 0.5, labels, fontsize=8)


def _scores(panel: "Axes", backtest: Backtest) -> None:
    for (version, (counts, _, _)), colour in zip(
        backtest.curves().items(), (_BLUE, _ORANGE), strict=True
    ):
        share = counts / max(counts.sum(), 1)
        panel.stairs(share, np.arange(len(share) + 1) - 0.5, color=colour, label=version, lw=1.5)
    _ticks(panel, backtest, "x")
    panel.set(title="scores", xlabel="score (bins as the guard has them)", ylabel="part of rows")
    panel.legend(title="version", frameon=False)


def _paired(panel: "Axes", backtest: Backtest) -> None:
    counts: Any = np.where(backtest.joint > 0, np.log10(np.maximum(backtest.joint, 1)), np.nan)
    drawn = panel.imshow(counts.T, origin="lower", aspect="auto", cmap="viridis")
    panel.plot([0, len(counts) - 1], [0, len(counts) - 1], color=_GREY, lw=0.8)
    panel.figure.colorbar(drawn, ax=panel, label="log10 rows")
    _ticks(panel, backtest, "x")
    _ticks(panel, backtest, "y")
    panel.set(
        title="the same row by both",
        xlabel=f"score of {backtest.incumbent}",
        ylabel=f"score of {backtest.challenger}",
    )


def _calibration(panel: "Axes", backtest: Backtest) -> None:
    panel.set(title="calibration", xlabel="mean score", ylabel="rate of label 1")
    curves = backtest.curves()
    if not any(np.isfinite(rate).any() for _, _, rate in curves.values()):
        panel.text(0.5, 0.5, "no labels", ha="center", va="center", transform=panel.transAxes)
        return
    panel.plot([0, 1], [0, 1], color=_GREY, lw=0.8)
    for (version, (_, score, rate)), colour in zip(curves.items(), (_BLUE, _ORANGE), strict=True):
        labels = backtest.labels[version]
        enough = labels.positives + labels.negatives >= 20
        panel.plot(score[enough], rate[enough], ".-", color=colour, label=version, lw=1, ms=4)
    panel.legend(title="version", frameon=False)


def _segments(panel: "Axes", backtest: Backtest, report: BacktestReport) -> None:
    limit = backtest.thresholds.segment_psi
    panel.set(title="PSI by segment, worst first", xlabel="PSI")
    worst = report.table()[:_SEGMENTS]
    if not worst:
        panel.text(0.5, 0.5, "no segments", ha="center", va="center", transform=panel.transAxes)
        return
    sizes = [one.size or 0.0 for one in worst]
    colours = [_ORANGE if one.failed else _BLUE for one in worst]
    places = np.arange(len(worst))
    panel.barh(places, sizes, color=colours)
    panel.set_yticks(places, [f"{one.segment} ({one.rows:,})" for one in worst], fontsize=8)
    panel.invert_yaxis()
    panel.axvline(limit, color=_GREY, lw=1, ls="--")
    panel.set_xlim(0, max(limit, *sizes) * 1.1)
