"""Tables and figures of the measures of exposure bias: one CSV and one PNG for any number of runs."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from utils.atomic import atomic_path, write_text

Rows = list[dict]
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")    # Okabe and Ito
STYLES = ("-", "--", ":", "-.")


class Curve(NamedTuple):
    label: str | None                # None: not in the legend
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] | None = None       # standard errors, drawn as a band of two
    colour: int = 0
    style: int = 0


class Panel(NamedTuple):
    ylabel: str
    curves: list[Curve]
    reference: float | None = None   # a thin line there
    scale: str = "linear"
    title: str = ""
    xlabel: str | None = None        # None: time, which falls from left to right as the chain runs


def write_table(runs: dict[str, Rows], path: Path) -> None:
    """One CSV, the run's name in the first column."""
    text = io.StringIO()
    rows = [{"run": name, **row} for name, found in runs.items() for row in found]
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_text(path, text.getvalue())


def write_figure(title: str, panels: list[Panel], path: Path, log_time: bool = False) -> None:
    """The panels side by side; ``log_time`` for times that are noise levels."""
    figure = _figure(6 * len(panels), 4.2)
    figure.suptitle(title, fontsize="medium")
    together = all(panel.title for panel in panels)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False, sharey=together)[0], panels, strict=True):
        _draw(axes, panel, log_time)
    _save(figure, path, 150)


def write_panel(panel: Panel, path: Path, log_time: bool = False) -> None:
    """One panel alone, of a size that can be read on a telephone."""
    figure = _figure(4.4, 3.5)
    _draw(figure.subplots(), panel, log_time)
    _save(figure, path, 190)


def _figure(width: float, height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure, path: Path, dpi: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png")


def _draw(axes, panel: Panel, log_time: bool) -> None:
    for curve in panel.curves:
        colour = PALETTE[curve.colour % len(PALETTE)]
        axes.plot(curve.x, curve.y, color=colour, linestyle=STYLES[curve.style % len(STYLES)], label=curve.label,
                  linewidth=1.6, marker="o" if len(curve.x) <= 25 else None, markersize=3)
        if curve.error:
            low, high = zip(*((y - 2 * error, y + 2 * error) for y, error in zip(curve.y, curve.error, strict=True)),
                            strict=True)
            axes.fill_between(curve.x, low, high, color=colour, alpha=0.15, linewidth=0)
    if panel.reference is not None:
        axes.axhline(panel.reference, color="0.4", linewidth=0.8, zorder=0)
    axes.set(xlabel=panel.xlabel or "time $t$ (the chain runs to the right)", ylabel=panel.ylabel, yscale=panel.scale)
    axes.set_title(panel.title, fontsize="medium")
    if panel.xlabel is None:
        axes.invert_xaxis()
        if log_time:
            axes.set_xscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    if any(curve.label for curve in panel.curves):
        axes.legend(fontsize="small", frameon=False)
